"""How long graphs take."""
