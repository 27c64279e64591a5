"""The report on a model before it is trained."""
