"""Draws frames as figures: no file here reads a table or computes an estimate of its own."""
