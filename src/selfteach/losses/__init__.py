"""Compute losses per token: divergences, policy gradients, token masks, and fused kernels."""
