"""Tables: what all of them share, and reading what users bring."""
