"""Running on Ray: connecting, engines, watching, retrying, writing parts, progress and metrics."""
