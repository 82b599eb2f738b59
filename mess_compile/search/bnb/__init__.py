"""Branch and bound, for spaces too large to enumerate."""
