"""What people look at: the HTML report, comparisons, inspections, what `search` prints, and pictures."""
