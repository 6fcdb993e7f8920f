"""Scoring sequences with vLLM: the engine and its arguments, checks of its answers, and failures."""
