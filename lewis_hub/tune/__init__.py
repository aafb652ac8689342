"""Search over recipes: what is tried, on what, and what came out."""
