"""Runs untrusted Python: plain scripts of the standard library alone, which import nothing else."""
