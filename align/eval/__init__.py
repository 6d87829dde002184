"""Evaluation of reward models and policies."""
