"""Whether an engine has the trainer's weights, from what both say of one prompt; by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selfteach.errors import EngineError
from selfteach.rollout.vllm.weight_check import Fingerprint, Probe

SAID = {0: math.log(0.2), 1: math.log(0.8)}
"""Logits (0, ln 4): probabilities 1/5 and 4/5."""


class Trainer:
    """Two tokens, whose second has these odds."""

    def __init__(self, odds: float, temperature: float = 1.0, tolerance: float = 0.1) -> None:
        self.odds = odds
        probe = Probe((1, 2, 3), temperature, self.logits)
        self.fingerprint = Fingerprint(probe, tolerance)

    def logits(self) -> Tensor:
        return torch.tensor([0.0, math.log(self.odds)])

    def check(self, said: dict[int, float]) -> float:
        return self.fingerprint.check(said, self.logits(), "the engine")


def test_the_largest_difference_counts() -> None:
    said = {0: SAID[0] + 0.03, 1: SAID[1] - 0.07}
    assert Trainer(4.0).check(said) == pytest.approx(0.07, abs=1e-6)
    assert Trainer(4.0).check(SAID) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("said", [{1: SAID[1] - 0.2}, {2: -1.0}, {}, {1: math.nan}])
def test_others_weights_are_refused(said: dict[int, float]) -> None:
    with pytest.raises(EngineError, match="the engine has other weights than the trainer"):
        Trainer(4.0).check(said)


def test_at_a_temperature_logits_are_divided() -> None:
    # At temperature 2 the odds are the root of 4: one to two.
    assert Trainer(4.0, 2.0).check({0: math.log(1 / 3), 1: math.log(2 / 3)}) < 1e-6
    with pytest.raises(EngineError, match="processed_logprobs"):
        Trainer(4.0, 2.0).check(SAID)


def test_the_same_to_the_last_bit_is_stale_where_the_trainer_has_moved() -> None:
    trainer = Trainer(4.0)
    trainer.check(SAID)
    trainer.odds = 4.05  # well within the tolerance
    with pytest.raises(EngineError, match="the engine is stale"):
        trainer.check(dict(SAID))


def test_an_engine_that_moves_is_not_stale_nor_one_that_has_nowhere_to_go() -> None:
    trainer = Trainer(4.0)
    trainer.check(SAID)
    trainer.check(dict(SAID))
    trainer.odds = 4.0001  # less than an engine need show
    trainer.check(dict(SAID))
    trainer.odds = 4.05
    trainer.check({0: SAID[0] - 1e-7, 1: SAID[1]})


def test_weights_are_recognised_by_what_the_engine_said_of_them_whatever_the_trainer_does() -> None:
    trainer = Trainer(4.0)
    trainer.check(SAID)
    trainer.odds = 9.0
    trainer.fingerprint.verify_restart(SAID, "the engine")
    for other in ({0: SAID[0] + 0.2}, {7: -1.0}):
        with pytest.raises(EngineError, match="another model"):
            trainer.fingerprint.verify_restart(other, "the engine")


def test_many_small_steps_are_held_against_the_first() -> None:
    trainer = Trainer(4.0)
    trainer.check(SAID)
    with pytest.raises(EngineError, match="stale"):
        for _ in range(20):  # 0.0002 nats each
            trainer.odds *= 1.0003
            trainer.check(dict(SAID))
