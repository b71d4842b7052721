"""From sketches to a selection: language directions, pair scores, keep rules (numpy only, no Ray)."""
