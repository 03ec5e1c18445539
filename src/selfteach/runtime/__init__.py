"""Provides what surrounds a run: its folder, ranks, signals, seeds, tracking."""
