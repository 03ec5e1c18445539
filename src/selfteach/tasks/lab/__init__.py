"""Simulates a tiny world in which every quantity of the paper exists and its true value is known."""

from selfteach.tasks.lab.world import BELIEFS, STYLES, World, WorldConfig

__all__ = ["BELIEFS", "STYLES", "World", "WorldConfig"]
