"""Losses per token: divergences, the policy gradient, token masks, and their fused forms."""
