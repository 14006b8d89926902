"""Phases, the one loop that runs them, checkpoints and resume."""
