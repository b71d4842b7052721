"""Answers of the starting model, which later ones are compared with."""
