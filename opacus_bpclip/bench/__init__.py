"""The benchmark: whole training steps, as ratios to training the same model without privacy."""
