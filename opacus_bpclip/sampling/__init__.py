"""The private loader, and the log of what it has drawn."""
