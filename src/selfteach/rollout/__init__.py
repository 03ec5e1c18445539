"""Engines: sample rollouts with transformers or vLLM."""
