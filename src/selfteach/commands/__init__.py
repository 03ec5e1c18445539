"""The functions behind the commands of `selfteach.cli`."""
