"""Scores that a model gives its classes, made a few classes at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Self

import torch
from torch import Tensor


class Part(NamedTuple):
    """Scores ``(N, k, *S)`` (classification: ``(N, k)``) of some classes, and their global ids."""

    class_ids: tuple[int, ...]
    scores: Tensor


@dataclass(frozen=True)
class Prediction:
    """What a model says of a batch of images: scores by class, computed when they are asked for.

    Scores are comparable over all classes; the highest wins. Averaging scores of overlapping windows or of several
    models must make sense (probabilities, not logits). Nothing is computed for a class before :meth:`score` asks for
    it, so that 150 classes at full resolution need not exist at once.

    Args:
        class_ids: Global id of each channel; 0 where a channel stands for background.
        score: Channels -> their scores ``(N, k, *S)``, or ``(N, k)`` in classification.
        groups: Numbers of consecutive channels that are computed together, one group per head; together they make
            up ``class_ids``. One group if not given.
        held_bytes: Memory that the prediction holds while it is alive (features). Predictions of many windows are
            kept between groups of classes only where this fits, and computed again otherwise.
    """

    class_ids: tuple[int, ...]
    score: Callable[[Sequence[int]], Tensor]
    groups: tuple[int, ...] = ()
    held_bytes: int = 0

    @classmethod
    def dense(cls, scores: Tensor, class_ids: Sequence[int]) -> Self:
        """A prediction whose scores ``(N, K, *S)`` are there already."""
        return cls(tuple(class_ids), lambda channels: scores[:, list(channels)], held_bytes=scores.nbytes)

    def chunks(self, most: int) -> list[tuple[int, ...]]:
        """All channels in order, cut into runs of at most ``most``; a group is only cut where it alone is larger."""
        runs: list[tuple[int, ...]] = []
        channels = iter(range(len(self.class_ids)))
        for size in self.groups or (len(self.class_ids),):
            group = tuple(islice(channels, size))
            if runs and len(runs[-1]) + size <= most:
                runs[-1] += group
            else:
                runs += [group[i : i + most] for i in range(0, size, most)]
        return runs

    def scores(self) -> Tensor:
        """All scores at once, ``(N, K, *S)``."""
        return self.score(range(len(self.class_ids)))

    def labels(self) -> Tensor:
        """Global ids ``(N, *S)`` or ``(N,)`` int64 of the winning channel; the first channel wins a tie."""
        scores = self.scores()
        return torch.as_tensor(self.class_ids, device=scores.device)[scores.argmax(1)]
