"""The trained policy against its starting point: comparisons and statistics."""
