"""Volumes: how they are planned, preprocessed and stored while they are needed."""
