"""Length-penalised DPO with DeepSpeed: the loop that Ray Train's workers run, and its pure parts."""
