"""Attaches early exits to a trained single-exit network."""
