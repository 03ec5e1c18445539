"""The HTML report, a single file."""
