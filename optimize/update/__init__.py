"""Optimizers, and their state."""
