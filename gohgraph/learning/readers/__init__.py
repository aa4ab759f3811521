"""How models read: a model with its tokenizer, what it is given of a text, and what it predicts there."""
