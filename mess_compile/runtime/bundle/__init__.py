"""Reads and writes bundles; what is read is not trusted."""
