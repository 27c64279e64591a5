"""A model's trainable layers, their calls, and the parameters that no rule bounds."""
