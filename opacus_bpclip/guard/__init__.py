"""The checks that run on every batch."""
