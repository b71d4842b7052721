"""Run directories: one folder per stage on any filesystem, manifests, resume."""
