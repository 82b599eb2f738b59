"""Reads and writes frames, pictures and arrays."""
