"""Volumes: their files, and how they become what a network trains on."""
