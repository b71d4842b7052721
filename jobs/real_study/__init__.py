"""The study on a real model: what selection keeps of real preference pairs, and what training on it is worth."""
