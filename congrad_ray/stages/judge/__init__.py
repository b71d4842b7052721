"""Scores of responses: rubrics, reading a judgement, what could not be read."""
