"""How a model's forward pass divides into stages, as users declare it."""
