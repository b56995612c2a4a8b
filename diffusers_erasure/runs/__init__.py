"""Runs that take long: their options, checkpoints, and what happens when they are interrupted."""
