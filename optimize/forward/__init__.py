"""Log-probs of packed sequences, and their gradients."""
