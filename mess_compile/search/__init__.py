"""From latency table and exit statistics to a plan."""
