"""Pairs to token ids: chat templates, tokenization, truncation."""
