"""Ships bundles to devices, and chooses their thresholds again there."""
