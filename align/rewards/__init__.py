"""Judges of responses: readers of reward checkpoints, services and functions. Importing this loads no torch."""
