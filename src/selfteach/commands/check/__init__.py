"""Commands behind `selfteach check`: what a recipe runs, holds in memory and costs."""
