"""Frames, pictures and arrays in and out."""
