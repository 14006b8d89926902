"""The same few test samples after each task, or from each run, as rows of pictures or of class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from PIL import Image

from perdure.labels import BACKGROUND, Color
from perdure.report.colors import hex_color
from perdure.report.render import picture, thumbnail
from perdure.report.run_data import RunData
from perdure.report.samples import ClassSample, Sample, SampleFiles
from perdure.streams.description import DescribedStream

MOST_SAMPLES: Final = 6


@dataclass(frozen=True)
class Said:
    """What a model called an image: the class's name, and ``right``, ``wrong`` or ``before`` (not taught yet)."""

    name: str
    state: str


def sample_table(run: RunData) -> dict[str, Any]:
    """Rows of one run: each sample with what the model says after each task.

    Returns:
        ``tasks``: the tasks that have samples; ``rows`` and ``legend``: see :func:`rows_of`.
    """
    tasks = [t for t in run.samples if run.samples[t]]
    if not tasks:
        return {"tasks": [], "rows": [], "legend": []}
    names = list(run.samples[tasks[-1]])[:MOST_SAMPLES]
    columns = [(run.stream, t, run.samples[t]) for t in tasks]
    return {"tasks": [run.stream.tasks[t] for t in tasks], **rows_of(names, columns)}


def rows_of(
    names: Sequence[str], columns: Sequence[tuple[DescribedStream, int, Mapping[str, Sample]]]
) -> dict[str, Any]:
    """Lay samples out: one row a name, one column a model.

    Args:
        names: Which samples.
        columns: Of each model its stream, after which task it was asked, and its samples by name. The last column
            has every name.

    Returns:
        ``rows``: dicts with ``name``, ``image`` (a :class:`perdure.report.render.Thumb`), ``truth`` and ``predictions``
        (pictures, or a name and :class:`Said`; ``None`` where a model has no such sample); ``legend``: names and
        colours of the classes in label maps.
    """
    if not names:
        return {"rows": [], "legend": []}
    stream, _, last = columns[-1]
    rows = []
    for name in names:
        sample = last[name]
        found = [(known, t, samples.get(name)) for known, t, samples in columns]
        row: dict[str, Any] = {"name": name, "maps": isinstance(sample, SampleFiles)}
        if isinstance(sample, SampleFiles):
            said: list[str | Said | None]
            said = [picture(s.pred, sharp=True) if isinstance(s, SampleFiles) else None for _, _, s in found]
            row |= {"image": picture(sample.image, sharp=False), "truth": picture(sample.truth, sharp=True)}
        else:
            with Image.open(sample.image) as image:
                row["image"] = thumbnail(image)
            row["truth"] = stream.names.get(sample.truth, str(sample.truth))
            said = [_said(known, t, s) if isinstance(s, ClassSample) else None for known, t, s in found]
        rows.append(row | {"predictions": said})
    shown = [s for _, _, samples in columns for n in names if isinstance(s := samples.get(n), SampleFiles)]
    return {"rows": rows, "legend": legend(stream, shown)}


def _said(stream: DescribedStream, after: int, sample: ClassSample) -> Said:
    name = stream.names.get(sample.predicted, str(sample.predicted))
    if sample.truth == sample.predicted:
        return Said(name, "right")
    return Said(name, "wrong" if sample.truth in stream.tasks[after].seen else "before")


def legend(stream: DescribedStream, files: Sequence[SampleFiles]) -> list[tuple[str, str]]:
    """Name and colour of the classes that are seen in some label maps."""
    seen: set[Color] = set()
    for path in {p for f in files for p in (f.truth, f.pred)}:
        with Image.open(path) as image:
            pixels = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
        seen |= {(int(r), int(g), int(b)) for r, g, b in pixels}
    entries = [(c.name, hex_color(c.color)) for c in stream.classes if c.color in seen]
    start = [(stream.names[BACKGROUND], "#000000")] if (0, 0, 0) in seen else []
    end = [("not labelled", "#e0e0e0")] if (224, 224, 224) in seen else []
    return start + entries + end
