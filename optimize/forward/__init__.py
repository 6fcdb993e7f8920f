"""The policy's forward: packing, attention, log-probs and their gradients, loading and checking a model."""
