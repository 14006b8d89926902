"""Pages and tables for people, made from a run folder alone. Importing this package loads nothing."""
