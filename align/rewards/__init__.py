"""Scorers of responses: checkpoints, ensembles, generative reward models, services, functions. Loads no torch."""
