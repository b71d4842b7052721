"""Kept pairs as other trainers read them: rows, files, a dataset card, and a push to the hub."""
