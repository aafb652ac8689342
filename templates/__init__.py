"""Text templates: the model card, recipes, workflows."""
