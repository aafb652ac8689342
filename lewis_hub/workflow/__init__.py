"""The steps from a recipe to a published model, a module each."""
