"""Defines ``[sampling]`` and ``[evaluation]``: how rollouts are sampled, in training and for scores."""

from __future__ import annotations

from pydantic import Field, model_validator

from selfteach.config.schema import Section


class TokenCuts(Section):
    """Cuts unlikely tokens off the distribution that is sampled from."""

    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the fewest likeliest tokens whose probabilities sum to this; 1: from all."""
    top_k: int = Field(default=0, ge=0)
    """Sample from this many likeliest tokens; 0: from all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens at least this times as likely as the likeliest; 0: from all."""

    @property
    def cuts(self) -> str:
        """Return the keys that cut the distribution, with their values; empty if none does."""
        set_keys = {
            "top_p": self.top_p if self.top_p < 1 else None,
            "top_k": self.top_k or None,
            "min_p": self.min_p or None,
        }
        return ", ".join(f"{key} = {value:g}" for key, value in set_keys.items() if value)


class SamplingConfig(TokenCuts):
    """Sets how training rollouts are sampled."""

    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_tokens: int = Field(default=64, ge=1)
    """Longest rollout in tokens. The default is for the lab; for other models it is 1024."""
    batch_size: int = Field(default=256, ge=1)
    """Rollouts sampled in one batch; a batch is saved to the run folder before it is trained on."""
    separate_copy: bool = False
    """Sample with a second copy of the weights, so that sampling and training can overlap: for
    ``train.staleness`` above 0, on a machine with cores or memory to spare."""
    dynamic_rounds: int = Field(default=0, ge=0)
    """Dynamic sampling (DAPO), for GRPO: most further rounds of a step. Each samples as many further
    problems as are missing for ``train.problems_per_step`` groups with mixed verdicts, and only such
    groups are in the loss. 0: no further rounds, and all groups count in it."""


class EvaluationConfig(TokenCuts):
    """Sets what is evaluated, and when. Nothing is ever selected on the test problems."""

    every: int = Field(default=10, ge=1)
    """Steps between evaluations on the validation problems."""
    validation_k: int = Field(default=4, ge=1)
    """Rollouts of each validation problem."""
    test_k: int = Field(default=12, ge=1)
    """Rollouts of each test problem: the k of Avg@k, Pass@k and Maj@k."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature of evaluations; 0: greedy, with ``validation_k`` and ``test_k`` of 1."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest rollout in tokens; unset: that of ``sampling``."""
    test: bool = True
    """Evaluate on the test problems once, after the last step."""

    @model_validator(mode="after")
    def _check_greedy(self) -> EvaluationConfig:
        if self.temperature == 0 and max(self.validation_k, self.test_k) > 1:
            raise ValueError(
                "temperature = 0 is greedy, and all rollouts of a problem would be the same: set "
                "evaluation.validation_k = 1 and evaluation.test_k = 1"
            )
        return self
