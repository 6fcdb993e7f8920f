"""Prompts to completions to ranked completions: preference data made by models, before ``precompute``."""
