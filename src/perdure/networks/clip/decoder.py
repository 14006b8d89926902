"""Class queries, the attention decoder whose scores are the masks, and the presence head (spec CLIP-CISS 2.3 to 2.5).

Nothing here knows a number of classes: rows of a text table come with each call, and more classes add no parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from perdure.errors import UsageError

INIT_STD = 0.02
"""Of linear layers at the published length of 512; see :func:`init_linear`."""


class Decoded(NamedTuple):
    """What the decoder makes of an image batch and a text table of C rows.

    Args:
        q0: Class queries before the decoder, ``(B, C, D)``.
        queries: Queries after each stage, ``(S, B, C, D)``.
        masks: One tensor of logits ``(B, C, h, w)`` per stage, float32: the scores of this stage and of all before
            it, added up. The last is the mask, the others are auxiliary.
    """

    q0: Tensor
    queries: Tensor
    masks: tuple[Tensor, ...]


class ClassQueries(nn.Module):
    """``q0 = W [v ⊙ t ; t] + b``: one query per text row t and image vector v (2.3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * dim, dim)

    def forward(self, cls: Tensor, text: Tensor) -> Tensor:
        """Image vectors ``(B, D)`` and text rows ``(C, D)`` -> queries ``(B, C, D)``, float32."""
        related = cls[:, None] * text
        queries: Tensor = self.project(torch.cat([related, text.expand_as(related)], -1))
        return queries.float()


class ScoreAttention(nn.Module):
    """Cross-attention of class queries to image cells that also returns its scores before the softmax."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``(B, C, D)``, memory ``(B, n, D)`` -> attended ``(B, C, D)``, scores ``(B, heads, C, n)``."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, queries), (self.key, memory), (self.value, memory))
        )
        # Not scaled_dot_product_attention: the scores themselves are wanted. Scaled before the product, for half
        # precision has less room for sums.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        attended = self.dropout(scores.float().softmax(-1)).to(v.dtype) @ v
        return self.out(attended.transpose(1, 2).flatten(2)), scores


class DecoderLayer(nn.Module):
    """Self-attention among the class queries, cross-attention to the image, feed-forward; post-norm (2.4)."""

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.cross_attention = ScoreAttention(dim, heads, dropout)
        self.feed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, queries: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``(B, C, D)`` float32, memory ``(B, n, D)`` -> the same of queries, scores ``(B, heads, C, n)``."""
        # queries stay float32 under autocast: every sum has a float32 part, and so have the norms
        first, second, third = self.norms
        related, _ = self.self_attention(queries, queries, queries, need_weights=False)
        queries = first(queries + self.dropout(related).float())
        attended, scores = self.cross_attention(queries, memory)
        queries = second(queries + self.dropout(attended).float())
        queries = third(queries + self.dropout(self.feed(queries)).float())
        return queries, scores


class DecoderStage(nn.Module):
    """One feature map, projected, and the layers that read it."""

    def __init__(self, width: int, dim: int, heads: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden, dropout) for _ in range(layers))

    def forward(self, queries: Tensor, feature_map: Tensor) -> tuple[Tensor, Tensor]:
        """Queries ``(B, C, D)``, map ``(B, width, h, w)`` -> queries, last layer's mean scores ``(B, C, h, w)``."""
        memory = self.norm(self.project(feature_map.flatten(2).mT).float())
        scores = queries
        for layer in self.layers:
            queries, scores = layer(queries, memory)
        return queries, scores.float().mean(1).reshape(*queries.shape[:2], *feature_map.shape[2:])


class AttentionDecoder(nn.Module):
    """Lets all class queries attend to the image, deepest map first; the scores are the masks (2.4).

    As the queries also attend to each other, a class's output depends on which other classes are asked for, in no
    order.

    Args:
        widths: Channels of the encoder's maps, deepest last; one stage each.
        dim: Length of queries: that of the text rows.
        layers: Per stage.
        heads: Attention heads.
        dropout: Also of the attention weights.

    Raises:
        UsageError: ``dim`` is no multiple of ``heads``, or there is no layer.
    """

    def __init__(
        self, widths: Sequence[int], dim: int, *, layers: int = 3, heads: int = 8, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if layers < 1 or heads < 1 or dim % heads:
            raise UsageError(
                f"a decoder with {layers} layers and {heads} heads cannot be built on vectors of length {dim}",
                "give at least one layer, and heads that divide the length",
            )
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout is {dropout}", "give a share of at least 0 and below 1")
        self.queries = ClassQueries(dim)
        self.stages = nn.ModuleList(
            DecoderStage(width, dim, heads, 4 * dim, layers, dropout) for width in reversed(widths)
        )
        init_linear(self, dim)
        self._init_self_attention()

    def forward(self, maps: Sequence[Tensor], cls: Tensor, text: Tensor) -> Decoded:
        """Decode text rows ``(C, D)`` on maps ``(B, width, h, w)`` (deepest last) and image vectors ``(B, D)``."""
        q0 = queries = self.queries(cls, text)
        after: list[Tensor] = []
        masks: list[Tensor] = []
        for stage, feature_map in zip(self.stages, reversed(maps), strict=True):
            queries, scores = stage(queries, feature_map)
            after.append(queries)
            masks.append(masks[-1] + scores if masks else scores)
        return Decoded(q0, torch.stack(after), tuple(masks))

    def _init_self_attention(self) -> None:
        """Xavier for the packed projections, and the same numbers in all layers of a stage, as published."""
        for stage in self.stages:
            packed = [part.in_proj_weight for part in stage.modules() if isinstance(part, nn.MultiheadAttention)]
            nn.init.xavier_uniform_(packed[0])
            for weight in packed[1:]:
                weight.data.copy_(packed[0])


class PresenceHead(nn.Module):
    """Is a class in the image at all? One linear layer without bias, shared by all classes (CACP, 2.5)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(3 * dim, 2, bias=False)
        init_linear(self, dim)

    def forward(self, query: Tensor, q0: Tensor, cls: Tensor, text: Tensor) -> Tensor:
        """Logits ``(B, C, 2)`` float32 of {present, absent}.

        Args:
            query: After the last stage, ``(B, C, D)``.
            q0: Before the first, ``(B, C, D)``.
            cls: Image vectors ``(B, D)``.
            text: Text rows ``(C, D)``.
        """
        logits: Tensor = self.project(torch.cat([query - q0, query * q0, cls[:, None] * text], -1))
        return logits.float()


def presence(logits: Tensor) -> Tensor:
    """Probability ``(B, C)`` that a class is in the image, from logits ``(B, C, 2)``."""
    return logits.softmax(-1)[..., 0]


def init_linear(module: nn.Module, dim: int) -> None:
    """Every linear layer: truncated normal of deviation 0.02 at length 512 (spec CLIP-CISS 2.4), bias 0.

    Shorter vectors get larger weights, so that attention scores, which are the masks, start at the same size: with 0.02
    at length 64 they are twenty times smaller, and for a long time queries of all classes see the same.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=INIT_STD * (512 / dim) ** 0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
