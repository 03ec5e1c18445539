"""Implement the commands of `selfteach.cli`."""
