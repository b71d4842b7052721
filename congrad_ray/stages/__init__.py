"""The stages, one folder each: `stage.py` is what runs on Ray, beside it the stage's algorithm."""
