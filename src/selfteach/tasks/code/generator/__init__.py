"""Generates small function tasks with hidden tests and worked solutions, offline."""
