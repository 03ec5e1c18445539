"""Runs episodes with tools: a calculator, Python in a sandbox, or an environment of a user's own."""
