"""Makes of a run a folder that others can use: merged weights, tokenizer, model card."""
