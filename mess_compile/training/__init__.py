"""Trains networks in torch: losses and the two stages."""
