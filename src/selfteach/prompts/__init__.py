"""Renders prompts: Jinja template sets, chat templates and the tokenizer."""
