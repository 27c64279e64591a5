"""What is checked on every batch."""
