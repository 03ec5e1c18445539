"""Compute the losses with Triton kernels."""
