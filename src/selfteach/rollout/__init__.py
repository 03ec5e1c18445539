"""Samples rollouts with transformers or vLLM."""
