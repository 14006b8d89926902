"""Coloured cells of tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell of a coloured table: text, CSS, a tooltip, and class names for special cells."""

    text: str
    style: str = ""
    title: str = ""
    kind: str = ""


@dataclass(frozen=True)
class HeatRow:
    """One class of a heat map."""

    class_id: int
    name: str
    color: str
    taught: str
    cells: tuple[Cell, ...]
    first: bool
