"""Builds tasks: problems with a verifier, a step splitter and, where there is one, an oracle."""
