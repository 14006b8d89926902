"""What every network offers, and what networks share whose classes grow with the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, NamedTuple, Self, TypeVar

from torch import Tensor, nn

from perdure.data.source import Kind
from perdure.errors import UsageError
from perdure.networks.layers import freeze_affine, hold_dropout, hold_norm
from perdure.networks.weights import Weights

FeaturesT = TypeVar("FeaturesT", bound=Tensor | tuple[Tensor, ...])
"""Features of a batch: one tensor, or the maps of several sizes that a decoder needs."""


class Network(nn.Module):
    """The contract of a network: all that the engine and a recipe's checks ask of it.

    Args:
        dims: Spatial axes of its images: 2 or 3.
        in_channels: Channels of its images, checked where given.
        least_batch: Fewest images that it can train on at once.
        weights: What it was initialised with; random if not given.

    Attributes:
        norm_frozen: True after :meth:`freeze_norm`.
        dropout_frozen: True after :meth:`freeze_dropout`.

    Raises:
        UsageError: ``dims`` is neither 2 nor 3.
    """

    def __init__(
        self, dims: int, *, in_channels: int | None = None, least_batch: int = 1, weights: Weights | None = None
    ) -> None:
        super().__init__()
        if dims not in (2, 3):
            raise UsageError(f"a network has 2 or 3 dimensions, not {dims}", "set dims to 2 or 3")
        self.dims = dims
        self.in_channels = in_channels
        self.least_batch = least_batch
        self.weights = weights if weights is not None else Weights("random")
        self.norm_frozen = False
        self.dropout_frozen = False

    def check_size(self, size: Sequence[int]) -> None:
        """Raise UsageError unless the network can take images of ``size``, pixels per spatial axis."""
        if len(size) != self.dims:
            raise UsageError(
                f"a {self.dims}D network cannot take a size of {len(size)} axes", "check dims and the crop"
            )

    def check_images(self, images: Tensor) -> None:
        """Raise UsageError unless images ``(N, C, *S)`` have the axes, channels and size of this network."""
        if images.ndim != self.dims + 2:
            raise UsageError(
                f"the network takes batches of {self.dims}D images, not a tensor of shape {tuple(images.shape)}",
                f"give (N, C, {'H, W' if self.dims == 2 else 'D, H, W'}), or use a network with other dims",
            )
        if self.in_channels is not None and images.shape[1] != self.in_channels:
            raise UsageError(
                f"the network takes images with {self.in_channels} channels, not {images.shape[1]}",
                f"build it with in_channels={images.shape[1]}, or convert the images",
            )
        self.check_size(images.shape[2:])

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part, each in one part; a method may give parts different learning rates."""
        return {"network": [p for p in self.parameters() if p.requires_grad]}

    def with_classifiers(self) -> Network:
        """The same for methods that train a classifier per class: itself, unless it knows classes in another way."""
        return self

    def compilable(self) -> list[nn.Module]:
        """Parts that torch.compile may replace: those that are called as modules (``part(x)``) in training."""
        return [self]

    def freeze_norm(self) -> None:
        """Keep normalisation as it is from now on, also in train mode (spec STAR 2.5).

        Running and group statistics stay as they are; scale and shift of all normalisation layers lose
        ``requires_grad``. Convolutions stay trainable, and dropout stays as it is.
        """
        self.norm_frozen = True
        freeze_affine(self)
        hold_norm(self)

    def freeze_dropout(self) -> None:
        """Switch every kind of dropout off from now on, also in train mode (spec STAR 2.5)."""
        self.dropout_frozen = True
        hold_dropout(self)

    def train(self, mode: bool = True) -> Self:
        """Set train or evaluation mode; frozen normalisation and frozen dropout stay in evaluation mode."""
        super().train(mode)  # puts every layer into that mode, also frozen ones
        if self.norm_frozen:
            hold_norm(self)
        if self.dropout_frozen:
            hold_dropout(self)
        return self


class Encoded(NamedTuple, Generic[FeaturesT]):
    """Images after the part of a network that does not depend on the classes: enough to score any of them later.

    Args:
        features: What the classifiers are applied to; its memory is what keeping an encoding costs.
        padded_size: Size of the images ``*S`` that the features were made from.
        size: Size of the images as they were given.
    """

    features: FeaturesT
    padded_size: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Memory that the features take."""
        return sum(part.nbytes for part in ((self.features,) if isinstance(self.features, Tensor) else self.features))


class GrowingNetwork(Network, Generic[FeaturesT]):
    """A body that makes features, and one classifier per task on top of them.

    A classifier may be anything that turns features into logits: a matrix, a table of texts, a decoder.

    There is no background channel: which class a channel stands for is decided by the method.

    Args:
        body: Images ``(N, C, *S)`` -> features ``(N, width, …)``. Parameters of a part called ``neck`` are a group
            of their own.
        width: Length of the features that the classifiers are applied to.
        dims: Spatial axes of the images: 2 or 3.
        in_channels: Channels of the images, checked where given.
        least_batch: Fewest images that it can train on at once.
        weights: What the body was initialised with; random if not given.

    Attributes:
        kind: What a label describes: a position of an image (segmentation) or the image (classification).
    """

    kind: ClassVar[Kind]

    def __init__(
        self,
        body: nn.Module,
        width: int,
        dims: int,
        *,
        in_channels: int | None = None,
        least_batch: int = 1,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(dims, in_channels=in_channels, least_batch=least_batch, weights=weights)
        self.body = body
        self.width = width

    def forward(self, images: Tensor) -> tuple[Tensor, FeaturesT]:
        """Logits ``(N, K, …)`` of all classes, and the features ``(N, width, …)`` they were made from."""
        features = self.features(images)
        return self.classify(features), features

    def features(self, images: Tensor) -> FeaturesT:
        """Features ``(N, width, …)`` of images ``(N, C, *S)``.

        Raises:
            UsageError: The network cannot take images of this shape.
        """
        self.check_images(images)
        features: FeaturesT = self.body(images)
        return features

    def classify(self, features: FeaturesT, first: int = 0, channels: Sequence[int] | None = None) -> Tensor:
        """Logits ``(N, K, …)`` of features ``(N, width, …)``, in task order.

        Args:
            features: Of images, or replayed ones.
            first: First task whose classes take part; negative counts from the end, as in a slice.
            channels: Compute these channels only, in this order; positions among the classes from ``first`` on.
        """
        raise NotImplementedError

    def encode(self, images: Tensor) -> Encoded[FeaturesT]:
        """The part of a prediction that is the same for all classes, for images ``(N, C, *S)``; see :meth:`score`."""
        size = tuple(images.shape[2:])
        return Encoded(self.features(images), size, size)

    def score(self, encoded: Encoded[FeaturesT], channels: Sequence[int] | None = None) -> Tensor:
        """Float32 logits, one per label: ``(N, K, *S)`` at the images' size, or ``(N, K)`` for whole images.

        Args:
            encoded: From :meth:`encode`. Scoring a few channels at a time bounds the memory that they take.
            channels: Positions of the wanted classes over all tasks; all if not given.
        """
        return self.classify(encoded.features, channels=channels).float()

    def full_logits(self, images: Tensor) -> Tensor:
        """Logits of all classes for images of any size that the network can be made to take; for prediction."""
        return self.score(self.encode(images))

    def grow(self, classes: int) -> None:
        """Append a classifier for ``classes`` new classes; the earlier ones are not changed.

        Weights are drawn on the CPU, so that a seed gives the same values on every device.
        """
        raise NotImplementedError

    def classifier_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of the classifier of each task, in task order."""
        raise NotImplementedError

    def freeze_old_classifiers(self) -> None:
        """Take all classifiers but the newest out of training: weight decay must not move them (spec STAR Q14)."""
        for classifier in self.classifier_parameters()[:-1]:
            for parameter in classifier:
                parameter.requires_grad_(False)
                parameter.grad = None

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part, each in one part; a part without any has an empty list.

        ``backbone`` (the body without its neck), ``neck`` (such as ASPP; empty where the body has none),
        ``old_classifiers`` (all but the newest) and ``new_classifier``.
        """
        body = list(self.body.named_parameters())
        classifiers = self.classifier_parameters()
        parts = {
            # by name: a second reference to the neck as a module would save its weights twice
            "backbone": [p for name, p in body if not name.startswith("neck.")],
            "neck": [p for name, p in body if name.startswith("neck.")],
            "old_classifiers": [p for classifier in classifiers[:-1] for p in classifier],
            "new_classifier": [p for classifier in classifiers[-1:] for p in classifier],
        }
        return {part: [p for p in parameters if p.requires_grad] for part, parameters in parts.items()}

    def compilable(self) -> list[nn.Module]:
        """The body: methods call :meth:`features` and :meth:`classify`, which torch.compile would not see."""
        return [self.body]
