"""`selfteach select`: build a training set of hard, well-formed, critic-solvable problems."""
