"""Dataset to tokenized pairs to reference log-probs to shards."""
