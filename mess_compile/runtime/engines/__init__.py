"""The engine libraries behind one interface."""
