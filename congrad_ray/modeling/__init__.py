"""Models and preference pairs as tensors: what sketching and training share. Imports no Ray."""
