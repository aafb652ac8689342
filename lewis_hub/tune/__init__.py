"""Search over recipes: space, objective, study and report."""
