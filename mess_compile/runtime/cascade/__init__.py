"""Runs a bundle's plan on frames."""
