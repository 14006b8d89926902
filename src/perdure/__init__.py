"""Perdure: segmentation models that learn task after task without forgetting."""

__version__ = "0.1.0"
