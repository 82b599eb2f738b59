"""torch: backbones, heads, the overprovisioned network."""
