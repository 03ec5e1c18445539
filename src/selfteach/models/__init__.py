"""The policy, the self-teacher and how their forward passes are made."""
