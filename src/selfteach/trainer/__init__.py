"""Training: the step, the loop around it, and how a recipe becomes components."""
