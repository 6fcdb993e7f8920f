"""Preference losses such as DPO's, one function each."""
