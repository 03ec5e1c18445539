"""Environments of the library `verifiers`: their rows as problems, their rubrics as rewards."""
