"""Writes bundles."""
