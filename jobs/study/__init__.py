"""The study: selection strategies compared on the built-in world. Run by `jobs/run_study.py`."""
