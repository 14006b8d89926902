"""STAR: prototype replay with balanced binary cross-entropy (Chen et al., NeurIPS 2023)."""

from perdure.methods.star.star import Star

__all__ = ["Star"]
