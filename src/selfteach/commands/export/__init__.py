"""Export a run's model for others: weights they can load, and a card that says what was measured."""
