"""A run's newest sealed model, ready to predict; the data it learned from is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from perdure.config.build import build_method
from perdure.data.preparation import Preparation
from perdure.data.readers.imagefiles import to_grey
from perdure.data.source import Kind
from perdure.errors import RunError, UsageError
from perdure.inference.case import predict_cases
from perdure.labels import BACKGROUND, LabelSpace
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.methods.prediction import Prediction
from perdure.run_folder import RunFolder
from perdure.sealing import restore_sealed
from perdure.streams.description import restore


class Answer(NamedTuple):
    """What a model says of one image.

    Args:
        labels: Global ids ``(*S)`` int16, or ``()`` where an image has one class.
        confidence: Score of the winning class, same shape, float32.
        scores: Score of each class by id where an image has one class; else empty.
    """

    labels: np.ndarray
    confidence: np.ndarray
    scores: dict[int, float]


@dataclass
class Trained:
    """A model with its classes.

    Args:
        method: In evaluation mode, on ``device``.
        preparation: How images are shown to it: that of the task it learned last.
        space: All classes of the stream.
        seen: Ids of the classes learned so far, in learning order.
        device: Where it computes.
        kind: Whether it labels pixels or images.
    """

    method: Method[Options]
    preparation: Preparation
    space: LabelSpace
    seen: tuple[int, ...]
    device: torch.device
    kind: Kind = "segmentation"

    @classmethod
    def open(cls, path: Path, device: str = "auto") -> Trained:
        """Load the newest sealed task of a run onto ``device``: auto (a GPU if there is one), cpu or cuda.

        Raises:
            UsageError: A GPU was asked for and there is none.
            RunError: The folder is not a run, or none of its tasks is sealed yet.
            DataError: A file of the run is damaged.
        """
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("--device is cuda, but no GPU can be used here", "use --device auto or cpu")
        run = RunFolder.existing(path)
        described = run.stream()
        recipe, stream, sealed = run.recipe(), restore(described), run.sealed()
        if not sealed:
            raise RunError(
                f"no task of {path} is sealed yet: there is nothing to predict with",
                "go on with `perdure run … --resume`",
            )
        where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
        method = build_method(recipe, stream.tasks[0].preparation, pretrained=False)
        restore_sealed(method, stream.tasks, run, sealed, recipe.seed)
        method.to(where).eval()
        newest = stream.tasks[len(sealed) - 1]
        return cls(method, newest.preparation, stream.space, newest.seen, where, described.kind)

    def predict(self, image: np.ndarray) -> Answer:
        """Label a photograph as test images are labelled in the run.

        Args:
            image: ``(3, H, W)`` uint8; made grey for a model that learned grey images.
        """
        shown = to_grey(image) if self.preparation.channels == 1 else image
        images = self.preparation.show(torch.from_numpy(np.array(shown)))[None].to(self.device)
        size = image.shape[1:] if self.kind == "segmentation" else ()
        made: list[Prediction] = []

        def predict(windows: torch.Tensor) -> Prediction:
            made.append(self.method.predict(windows))
            return made[-1]

        labels, confidence = predict_cases(predict, images, self.preparation, size)
        scores = {} if size else dict(zip(made[0].class_ids, made[0].scores()[0].tolist(), strict=True))
        return Answer(labels[0].cpu().numpy(), confidence[0].cpu().numpy(), scores)

    def classes(self) -> list[dict[str, object]]:
        """What :meth:`predict` may answer: ids with names and colours."""
        ids = (BACKGROUND, *sorted(self.seen)) if self.space.background else tuple(sorted(self.seen))
        return [{"id": c, "name": self.space.name(c), "color": list(self.space[c].color)} for c in ids]
