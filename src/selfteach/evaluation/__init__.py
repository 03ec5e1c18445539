"""Evaluates a policy: sampled rollouts, Avg@k, Pass@k, Maj@k, intervals, and scores per token."""
