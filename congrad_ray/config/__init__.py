"""What to do (the recipe) and where (the profile): strict settings, read from YAML."""
