"""Text from a transformers model in this process, as solver and local critic write it."""
