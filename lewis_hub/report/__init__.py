"""What a merge leaves behind for its readers: plots, card, lock."""
