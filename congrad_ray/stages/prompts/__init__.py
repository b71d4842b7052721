"""Prompts of the run: read, cleaned, drawn."""
