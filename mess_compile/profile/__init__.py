"""Measures every graph on a device, or a representative subset."""
