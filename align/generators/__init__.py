"""Generators of answers: local models, endpoints, functions."""
