"""Transformers built of these blocks: objects, sublayers, stacks, and whole models."""
