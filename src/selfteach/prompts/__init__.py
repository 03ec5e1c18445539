"""Prompts: the tokenizer, chat templates and Jinja templates."""
