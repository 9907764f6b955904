"""`rlhf-chat`: several finished runs answer the same prompts, side by side."""
