"""What a run saves and loads: checkpoints, tensors, models."""
