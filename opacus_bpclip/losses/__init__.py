"""Criteria whose gradients do not depend on the size of the batch."""
