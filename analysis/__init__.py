"""Shards and pair log-probs to frames to figures to report."""
