"""Writes a first recipe for a model and its problems, and shows what the model does with them."""
