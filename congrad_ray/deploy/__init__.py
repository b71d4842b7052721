"""Clusters: the files that start one, jobs sent to one, and what an installation lacks."""
