"""Measures how long graphs take."""
