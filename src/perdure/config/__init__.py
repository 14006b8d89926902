"""Recipes: typed, checked before anything starts, and how they become objects."""
