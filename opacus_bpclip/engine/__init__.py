"""Opacus's privacy engine, extended by ``clipping="backprop"``."""
