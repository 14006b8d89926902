"""Which runs may stand side by side, and what a reader has to know of them."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.errors import UsageError
from perdure.report.run_data import RunData
from perdure.report.words import warning


def check_same(a: RunData, b: RunData) -> None:
    """Raise UsageError unless two runs have the same data, classes and groups."""
    one, other = a.stream, b.stream
    differs = next(
        (
            what
            for what, same in (
                ("data set", one.dataset == other.dataset),
                ("classes", [(c.id, c.name) for c in one.classes] == [(c.id, c.name) for c in other.classes]),
                ("kind of labels", one.kind == other.kind),
                ("background", one.background == other.background),
                ("split of the classes into tasks", one.groups == other.groups),
                ("protocol", one.merged or other.merged or one.protocol == other.protocol),
            )
            if not same
        ),
        None,
    )
    if differs:
        said = f" ('{one.protocol}' and '{other.protocol}')" if differs == "protocol" else ""
        raise UsageError(
            f"runs '{a.name}' and '{b.name}' cannot be compared: their {differs} is not the same{said}",
            "compare runs of one stream (joint runs of the same classes may join)",
        )


def about_protocols(runs: Sequence[RunData]) -> list[str]:
    """Notes on protocols that a reader must know of."""
    protocols = list(dict.fromkeys(r.stream.protocol.removesuffix(", merged") for r in runs))
    notes = []
    if len(protocols) > 1:
        notes.append(f"the protocols of joint and other runs differ: {'; '.join(protocols)}")
    warnings = {text: [r.name for r in runs if warning(r.stream) == text] for r in runs if (text := warning(r.stream))}
    for text, names in warnings.items():
        notes.append(text if len(names) == len(runs) else f"{text} (runs {', '.join(names)})")
    return notes
