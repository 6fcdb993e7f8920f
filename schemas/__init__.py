"""What exists on disk and in memory: the contract between scoring, training and analysis."""
