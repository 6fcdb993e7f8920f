"""How much memory a training step takes, and how many tokens fit into a micro-batch."""
