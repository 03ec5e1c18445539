"""Evaluate a policy: sampled answers, Avg@k, Pass@k, Maj@k, intervals, and scores per token."""
