"""Clipping: the autograd nodes that replace layers, and the budgets that they share."""
