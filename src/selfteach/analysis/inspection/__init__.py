"""Summarize an inspection: where advantages are relative to the first error."""
