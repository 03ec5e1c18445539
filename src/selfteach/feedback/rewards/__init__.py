"""Reward rollouts: functions of TRL's signature, judges, the verifier, and their weighted sum."""
