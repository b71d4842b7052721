"""Is the model better: true scores, win rates, and how sure one can be of them."""
