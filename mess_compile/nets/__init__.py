"""Builds networks in torch: backbones, heads, the overprovisioned network."""
