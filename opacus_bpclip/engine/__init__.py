"""Opacus's engine, extended: what `make_private` checks, makes and hands back."""
