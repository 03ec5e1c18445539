"""Commands behind `selfteach select`: choose a training set and describe it in a data card."""
