"""The gradient of every pair, captured and count-sketched."""
