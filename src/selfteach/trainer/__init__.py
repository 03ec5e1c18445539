"""Trains: the step, the loop around it, and how components are built from a recipe."""
