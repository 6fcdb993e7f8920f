"""Completions of prompts become ranked completions, by numbers or by comparisons."""
