"""Runs vLLM as the engine: a server, or an engine in this process."""
