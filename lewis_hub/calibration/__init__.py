"""From texts to what a model does with them: activations, importance, second moments."""
