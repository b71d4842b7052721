"""DPO on the selected pairs with Ray Train and DeepSpeed."""
