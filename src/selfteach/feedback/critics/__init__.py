"""Holds critics: frozen programs or models that critique a rollout step by step.

`oracle` is a program that checks every step. The others are language models: `llm` requests critiques,
`parser` turns replies into critiques or typed failures, `reply_cache` saves every reply before it is
used, and `endpoint`, `local` and `recorded` are where replies come from.
"""
