"""Shards to packed batches to policy log-probs to loss to step to model."""
