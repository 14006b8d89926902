"""Volumes: what reading and preparing them needs."""
