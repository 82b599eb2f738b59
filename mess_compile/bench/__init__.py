"""Measures a bundle on labelled images."""
