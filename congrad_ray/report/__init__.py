"""One HTML file about a run: what was kept, what was thrown away and why, and what came of it."""
