"""`rlhf-export`: a finished run as a folder for others, with merged weights, tokenizer and model card."""
