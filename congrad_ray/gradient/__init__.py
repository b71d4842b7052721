"""Per-pair preference gradients, their count-sketches, and an exact oracle (torch only, no Ray)."""
