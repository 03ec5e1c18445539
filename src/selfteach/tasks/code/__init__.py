"""Runs unit tests on an answer's code, in an isolated process, and turns the outcome into a verdict."""
