"""Preference pairs from judged responses."""
