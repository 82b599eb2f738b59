"""This machine: what it is, its clocks and its power."""
