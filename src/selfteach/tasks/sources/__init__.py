"""Reads problems from files, datasets and generators, splits them, and audits their answers."""
