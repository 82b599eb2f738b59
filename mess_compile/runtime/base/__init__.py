"""Errors, strict JSON decoding and other parts that need no array."""
