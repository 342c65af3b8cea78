"""Training: recipes, sampling, losses, the loop."""
