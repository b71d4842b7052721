"""The controlled comparison of selection strategies on the built-in world; see jobs/study.py."""
