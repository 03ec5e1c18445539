"""The weight check of an engine: logprobs of one prompt against the trainer's; values by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selfteach.errors import EngineError
from selfteach.rollout.vllm.weight_check import Probe, WeightCheck

LOGPS = {0: math.log(0.2), 1: math.log(0.8)}
"""Logits (0, ln 4): probabilities 1/5 and 4/5."""


class Trainer:
    """A trainer of two tokens; ``odds`` are those of the second."""

    def __init__(self, odds: float, temperature: float = 1.0, tolerance: float = 0.1) -> None:
        self.odds = odds
        probe = Probe((1, 2, 3), temperature, self.logits)
        self.weight_check = WeightCheck(probe, tolerance)

    def logits(self) -> Tensor:
        return torch.tensor([0.0, math.log(self.odds)])

    def compare(self, engine_logps: dict[int, float]) -> float:
        return self.weight_check.compare(engine_logps, self.logits(), "the engine")


def test_the_largest_difference_is_returned() -> None:
    engine_logps = {0: LOGPS[0] + 0.03, 1: LOGPS[1] - 0.07}
    assert Trainer(4.0).compare(engine_logps) == pytest.approx(0.07, abs=1e-6)
    assert Trainer(4.0).compare(LOGPS) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("engine_logps", [{1: LOGPS[1] - 0.2}, {2: -1.0}, {}, {1: math.nan}])
def test_other_weights_are_an_error(engine_logps: dict[int, float]) -> None:
    with pytest.raises(EngineError, match="the engine has other weights than the trainer"):
        Trainer(4.0).compare(engine_logps)


def test_logits_are_divided_by_the_temperature() -> None:
    # At temperature 2 the odds are the root of 4: one to two.
    assert Trainer(4.0, 2.0).compare({0: math.log(1 / 3), 1: math.log(2 / 3)}) < 1e-6
    with pytest.raises(EngineError, match="processed_logprobs"):
        Trainer(4.0, 2.0).compare(LOGPS)


def test_identical_logprobs_are_stale_if_the_trainer_has_moved() -> None:
    trainer = Trainer(4.0)
    trainer.compare(LOGPS)
    trainer.odds = 4.05  # well within the tolerance
    with pytest.raises(EngineError, match="the engine is stale"):
        trainer.compare(dict(LOGPS))


def test_an_engine_that_moves_or_need_not_move_is_not_stale() -> None:
    trainer = Trainer(4.0)
    trainer.compare(LOGPS)
    trainer.compare(dict(LOGPS))
    trainer.odds = 4.0001  # too little to show in the engine's rounding
    trainer.compare(dict(LOGPS))
    trainer.odds = 4.05
    trainer.compare({0: LOGPS[0] - 1e-7, 1: LOGPS[1]})


def test_after_a_restart_the_engine_is_compared_with_itself_not_the_trainer() -> None:
    trainer = Trainer(4.0)
    trainer.compare(LOGPS)
    trainer.odds = 9.0
    trainer.weight_check.verify_restart(LOGPS, "the engine")
    for other in ({0: LOGPS[0] + 0.2}, {7: -1.0}):
        with pytest.raises(EngineError, match="another model"):
            trainer.weight_check.verify_restart(other, "the engine")


def test_many_small_steps_are_compared_with_the_first() -> None:
    trainer = Trainer(4.0)
    trainer.compare(LOGPS)
    with pytest.raises(EngineError, match="stale"):
        for _ in range(20):  # 0.0002 nats each
            trainer.odds *= 1.0003
            trainer.compare(dict(LOGPS))
