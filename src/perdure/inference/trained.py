"""A run's newest sealed model, ready to predict; the data it learned from is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.config.build import as_module, build_method
from perdure.config.recipe import Recipe
from perdure.data.readers.imagefiles import to_grey
from perdure.data.source import Kind
from perdure.data.transforms import fit_square, normalise, resize, shorter_to
from perdure.errors import RunError, UsageError
from perdure.inference.tiling import averaged
from perdure.labels import BACKGROUND, LabelSpace
from perdure.methods.method import Method
from perdure.run_folder import RunFolder
from perdure.sealing import restore_sealed
from perdure.streams.description import restore

TILE = 1024
SCORES_AT_ONCE = 1 << 27
"""Largest number of upsampled scores held at a time."""


@dataclass
class Trained:
    """A model with its classes.

    Args:
        method: In evaluation mode, on ``device``.
        recipe: How images are scaled and normalised.
        space: All classes of the stream.
        seen: Ids of the classes learned so far, in learning order.
        device: Where it computes.
        kind: Whether it labels pixels or images.
    """

    method: Method
    recipe: Recipe
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
        method = build_method(recipe, pretrained=False)
        restore_sealed(method, stream.tasks, sealed, recipe.seed)
        as_module(method).to(where).eval()
        return cls(method, recipe, stream.space, stream.tasks[len(sealed) - 1].seen, where, described.kind)

    def classify(self, image: np.ndarray) -> dict[int, float]:
        """Probability of each class seen so far, by class id; the first of equal ones is the method's choice.

        Any size is brought to the side that the model learned from, as in training.

        Args:
            image: ``(H, W, 3)`` uint8; made grey for a model that learned grey images.
        """
        augment = self.recipe.augment
        pixels = image.transpose(2, 0, 1)
        shown = to_grey(pixels) if len(augment.mean) == 1 else pixels.copy()
        square = fit_square(torch.from_numpy(shown), augment.crop)
        with torch.no_grad():
            scaled = normalise(square[None].to(self.device), augment.mean, augment.std)
            prediction = self.method.predict(scaled)
        return dict(zip(prediction.class_ids, prediction.scores[0].tolist(), strict=True))

    def segment(self, image: np.ndarray) -> np.ndarray:
        """Label map of a photograph.

        Args:
            image: ``(H, W, 3)`` uint8.

        Returns:
            ``(H, W)`` int16 global ids, same height and width.
        """
        height, width = image.shape[:2]
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].to(self.device)
        size = self.recipe.evaluate.size
        if size is not None:  # as test images are shown in `perdure run`
            pixels = resize(pixels, *shorter_to(size, height, width))
        scaled = normalise(pixels, self.recipe.augment.mean, self.recipe.augment.std)
        ids: list[int] = []

        def score(window: Tensor) -> Tensor:
            prediction = self.method.predict(window)
            ids[:] = prediction.class_ids
            return prediction.scores

        with torch.no_grad():
            scores = averaged(score, scaled, TILE)
            winner = winners(scores, (height, width))
        labels: np.ndarray = np.asarray(ids, np.int16)[winner.cpu().numpy()]
        return labels

    def classes(self) -> list[dict[str, object]]:
        """What :meth:`segment` or :meth:`classify` may answer: ids with names and colours."""
        ids = (BACKGROUND, *sorted(self.seen)) if self.space.background else tuple(sorted(self.seen))
        return [{"id": c, "name": self.space.name(c), "color": list(self.space[c].color)} for c in ids]


def winners(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Channel with the highest score ``(H, W)`` after bilinear resizing of ``(1, K, h, w)``, few channels at a time."""
    if scores.shape[2:] == size:
        return scores[0].argmax(0)
    step = max(1, SCORES_AT_ONCE // (size[0] * size[1]))
    best, index = None, None
    for first in range(0, scores.shape[1], step):
        part = F.interpolate(scores[:, first : first + step], size, mode="bilinear", align_corners=False)[0]
        value, where = part.max(0)
        if best is None or index is None:
            best, index = value, where
        else:
            better = value > best
            best, index = torch.where(better, value, best), torch.where(better, where + first, index)
    assert index is not None  # a prediction has at least one channel
    return index
