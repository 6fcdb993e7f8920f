"""What is wrong or suspicious in a dataset, before any GPU time."""
