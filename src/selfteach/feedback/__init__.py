"""Holds feedback: critics, alignment of critiques with rollouts, and contexts for the self-teacher."""
