"""LLM as a judge: rubrics by language, and reading scores from what the judge wrote."""
