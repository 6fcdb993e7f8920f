"""KL and the frontier: policies -> prompts -> samples -> log-probs of both models -> tables -> rewards."""
