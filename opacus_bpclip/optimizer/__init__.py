"""The private optimizer: noise, division, step, and its checkpoints."""
