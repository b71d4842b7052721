"""Preference pairs as tokens: tokenisation, batches, log-probabilities and the DPO loss (no Ray)."""
