"""Sampled responses of the policy."""
