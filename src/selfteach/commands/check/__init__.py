"""`selfteach check`: what a recipe would run, hold in memory and cost, before anything is spent."""
