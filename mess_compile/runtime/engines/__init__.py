"""Wraps the engine libraries behind one interface."""
