"""What a run will need before it runs: counts, FLOPs, memory, time, bytes, and whether it fits. Pure functions."""
