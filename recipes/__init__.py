"""Recipes: one story a file, read it top to bottom, run it as it is."""
