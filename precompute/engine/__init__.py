"""vLLM as a scorer of whole sequences, and what may go wrong with it."""
