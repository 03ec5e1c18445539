"""Feedback: critics, the alignment of a critique with its answer, and contexts for the self-teacher."""
