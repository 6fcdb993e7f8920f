"""The optimizers, the learning rate schedule, and the optimizers' state."""
