"""Which pairs are kept: directions, scores and keep rules over the sketches."""
