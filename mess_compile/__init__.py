"""mess-compile: a deployment compiler for multi-exit semantic segmentation networks."""

__version__ = "0.1.0"
