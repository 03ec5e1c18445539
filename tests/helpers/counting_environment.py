"""Counts the turns, and lets the third be the last."""

from selfteach.episodes import EnvironmentReply
from selfteach.types import Verdict


class Counting:
    tools = ()

    def __init__(self, last: int = 2) -> None:
        self.last, self.turns, self.seed = last, 0, None

    def reset(self, problem, seed):
        self.seed = seed
        return f"Your number is {seed % 7}."

    def step(self, turn):
        self.turns += 1
        done = self.turns > self.last
        return EnvironmentReply((f"turn {self.turns}: go on",), "observation", done)

    def verdict(self):
        good = self.turns > 1
        return Verdict(good, True, None, None if good else "You have stopped too early.")
