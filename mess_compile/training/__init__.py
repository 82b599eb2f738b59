"""torch: losses and the two stages of training."""
