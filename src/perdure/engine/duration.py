"""Lengths of time in words, for lines of a run and for pages, which load neither torch nor rich."""

from __future__ import annotations


def in_words(seconds: float) -> str:
    """A length of time: ``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
