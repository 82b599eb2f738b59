"""Ships bundles to devices."""
