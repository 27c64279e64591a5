"""The private data loader, and the log of the batches that it has drawn."""
