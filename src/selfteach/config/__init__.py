"""Defines the recipe's schema: typed sections, and how a recipe file resolves to recipes of runs."""
