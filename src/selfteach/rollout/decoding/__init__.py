"""Samples from a transformers model in this process, for the policy and for a local critic."""
