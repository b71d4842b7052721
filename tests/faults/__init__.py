"""The fault run's parts: a cluster of local nodes, the command under test, kills, and comparisons of tables."""
