"""Commands behind `selfteach study` and `selfteach sweep`: arms × seeds, run side by side."""
