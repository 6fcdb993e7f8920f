"""A folder of reference shards: planned, filled, finalized, repaired."""
