"""Training on several processes: collectives and sharded parameters."""
