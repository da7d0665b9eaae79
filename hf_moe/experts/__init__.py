"""Ways to run experts."""
