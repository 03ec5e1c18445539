"""Has the module of messages."""
