"""Preference losses, one function each."""
