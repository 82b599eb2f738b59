"""What people look at: overlays and progressive-refinement pictures."""
