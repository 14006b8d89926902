"""A finished (or so far sealed) run on new files."""
