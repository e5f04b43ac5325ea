"""Text to input ids: the tokenizer and the prompts."""
