"""vLLM under Ray Data: chat requests in, completions out."""
