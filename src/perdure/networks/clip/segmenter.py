"""Encoder, decoder and presence head as one network without a number of classes (spec CLIP-CISS 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, Self

from torch import Tensor, nn

from perdure.errors import UsageError
from perdure.networks.clip.decoder import AttentionDecoder, Decoded, PresenceHead
from perdure.networks.clip.encoder import NARROW, VIT_B16, ClipEncoder, EncoderOutput, MapsEncoder, VitShape
from perdure.networks.deeplab import TINY
from perdure.networks.layers import NORMS, batch_norms, freeze_affine, hold_frozen_norms
from perdure.networks.network import Network
from perdure.networks.segmenter import Segmenter
from perdure.networks.weights import Weights

PRESETS: Final = {"vit_b16": (VIT_B16, 512), "narrow": (NARROW, 64)}
"""Shapes by name, each with the side of the crops that it is for."""
TIMM_DIM = 128
TINY_DIM = 64


def clip_segmenter(
    encoder: VitShape | str = "vit_b16",
    *,
    in_channels: int = 3,
    input_size: int | None = None,
    weights: str | Path = "random",
    double_class_embedding: bool = True,
    dim: int | None = None,
    stride: int = 16,
    layers: int = 3,
    heads: int = 8,
    dropout: float = 0.1,
    train: str = "all",
) -> ClipSegmenter:
    """Build CLIP-CISS's network. The defaults are the published one (86,828,544 + 39,548,416 parameters).

    Args:
        encoder: ``vit_b16`` (CLIP's), ``narrow`` (a small transformer for images of about 64 pixels), sizes of a
            transformer (:class:`VitShape`), ``tiny_resnet`` (four small residual stages, the quickest to learn from
            random weights), or the name of a convolutional timm backbone, such as ``tf_efficientnet_lite0``.
        in_channels: Channels of the images.
        input_size: Side of the training crops in pixels; 512, or 64 for ``narrow``, if not given.
        weights: Of the encoder: ``random``; for CLIP a file or folder of weights; for a timm backbone also
            ``installed`` or ``imagenet``.
        double_class_embedding: Transformers: add the class embedding twice, as the published code does.
        dim: Length of text rows and queries: the transformer's joint space, or 128 for a timm backbone and 64 for
            ``tiny_resnet``, if not given.
        stride: Of a backbone's maps: pixels per cell, 8, 16 or 32, of ``tiny_resnet`` 4, 8 or 16. A transformer's cell
            is its patch.
        layers: Of each stage of the decoder; it has one stage per exported map.
        heads: Attention heads of the decoder.
        dropout: Of the decoder.
        train: ``all``, ``decoder`` (the encoder stays as it is), or ``last-N`` (also its last N blocks).

    Raises:
        UsageError: An option or the combination of options cannot be built.
        DataError: The weights do not fit.
    """
    body, record = _encoder(encoder, in_channels, input_size, weights, double_class_embedding, dim, stride)
    decoder = AttentionDecoder(body.widths, body.dim, layers=layers, heads=heads, dropout=dropout)
    network = ClipSegmenter(body, decoder, PresenceHead(body.dim), in_channels=in_channels, weights=record)
    network.freeze_encoder(train)
    return network


class Segmented(NamedTuple):
    """Everything that the network says of images ``(B, C_in, H, W)`` and C text rows.

    Args:
        encoded: The images alone.
        decoded: Queries and masks.
        presence: Logits ``(B, C, 2)`` of {present, absent}.
    """

    encoded: EncoderOutput
    decoded: Decoded
    presence: Tensor


class ClipSegmenter(Network):
    """Segments any classes that have a text row.

    Args:
        encoder: Image encoder.
        decoder: Built for the encoder's maps.
        presence: The head of same length.
        in_channels: Channels of the images.
        weights: What the encoder was initialised with; random if not given.

    Attributes:
        dim: Length of text rows.
        stride: Each side of an image must be a multiple of it.
    """

    def __init__(
        self,
        encoder: MapsEncoder,
        decoder: AttentionDecoder,
        presence: PresenceHead,
        *,
        in_channels: int = 3,
        weights: Weights | None = None,
    ) -> None:
        super().__init__(2, in_channels=in_channels, weights=weights)
        self.encoder = encoder
        self.decoder = decoder
        self.presence = presence
        self.dim = encoder.dim
        self.stride = encoder.stride

    def check_size(self, size: Sequence[int]) -> None:
        """Raise UsageError unless both sides are multiples of the encoder's stride."""
        super().check_size(size)
        if all(side > 0 and side % self.stride == 0 for side in size):
            return
        fitting = "×".join(str(max(round(side / self.stride), 1) * self.stride) for side in size)
        raise UsageError(
            f"the network cannot take images of {'×'.join(map(str, size))}: both sides must be multiples of "
            f"{self.stride}",
            f"crop or pad to a fitting size, for example {fitting}",
        )

    def forward(self, images: Tensor, text: Tensor) -> Segmented:
        """Everything about images ``(B, C_in, H, W)`` and text rows ``(C, D)``."""
        return self.decode(self.encode(images), text)

    def encode(self, images: Tensor) -> EncoderOutput:
        """The part that does not depend on the classes.

        Raises:
            UsageError: The network cannot take images of this shape.
        """
        self.check_images(images)
        encoded: EncoderOutput = self.encoder(images)
        return encoded

    def decode(self, encoded: EncoderOutput, text: Tensor) -> Segmented:
        """Masks and presence of the classes with text rows ``(C, D)``, all of them at once.

        Raises:
            UsageError: The rows have another length than the network's joint space.
        """
        if text.ndim != 2 or text.shape[1] != self.dim:
            raise UsageError(
                f"the network takes text rows of length {self.dim}, not a table of shape {tuple(text.shape)}",
                "make the table with the text encoder of the same model, or with dim of that length",
            )
        decoded: Decoded = self.decoder(encoded.maps, encoded.cls, text)
        present = self.presence(decoded.queries[-1], decoded.q0, encoded.cls, text)
        return Segmented(encoded, decoded, present)

    def freeze_encoder(self, train: str) -> None:
        """Take parts of the encoder out of training, for ever: ``all``, ``decoder`` or ``last-N`` stay trainable.

        Parts of the encoder that start from random weights beside pretrained ones keep training. Frozen parts also keep
        their BatchNorm statistics.

        Raises:
            UsageError: There is no such choice, or the encoder has fewer blocks.
        """
        if train == "all":
            return
        blocks = self.encoder.blocks()
        _, _, number = train.partition("last-")
        last = 0 if train == "decoder" else int(number) if number.isdecimal() and train == f"last-{number}" else -1
        if last < 0 or last > len(blocks) or train == "last-0":
            raise UsageError(f"train '{train}' is not possible", f"give all, decoder, or last-1 to last-{len(blocks)}")
        trained = [*blocks[len(blocks) - last :], *self.encoder.after_blocks()] if last else []
        kept = {parameter for part in trained for parameter in part.parameters()}
        for name, parameter in self.encoder.named_parameters():
            if parameter not in kept and not name.startswith(self.encoder.fresh):
                parameter.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set train or evaluation mode; frozen parts of the encoder keep their normalisation as it is."""
        super().train(mode)
        hold_frozen_norms(self.encoder)
        return self

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by part (spec 1.5): ``encoder``, ``encoder_norm``, ``decoder``, ``decoder_norm``.

        The two norms are scale and shift of all normalisation layers, which get no weight decay. Parts of the encoder
        that start from random weights beside pretrained ones are in ``decoder``.
        """
        names = ("encoder", "encoder_norm", "decoder", "decoder_norm")
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in names}
        fresh = tuple(f"encoder.{name}" for name in self.encoder.fresh)
        for name, module in self.named_modules():
            part = "encoder" if name.startswith("encoder") and not name.startswith(fresh) else "decoder"
            group = groups[f"{part}_norm" if isinstance(module, NORMS) else part]
            group += [parameter for parameter in module.parameters(recurse=False) if parameter.requires_grad]
        return groups

    def freeze_norm(self) -> None:
        """Keep BatchNorm as it is from now on, where the encoder has any; layer normalisation learns in every task."""
        self.norm_frozen = True
        for part in batch_norms(self):
            freeze_affine(part)
            part.training = False

    def with_classifiers(self) -> Segmenter:
        """The encoder with a linear classifier per class on its deepest map, for methods that read no names."""
        encoder = self.encoder
        return Segmenter(
            EncoderMap(encoder),
            encoder.dim,
            encoder.cell,
            2,
            multiple=(self.stride, self.stride),
            in_channels=self.in_channels,
            weights=self.weights,
        )

    def compilable(self) -> list[nn.Module]:
        """Encoder and decoder."""
        return [self.encoder, self.decoder]


class EncoderMap(nn.Module):
    """The deepest map of an encoder, brought to the length of its joint space: features for linear classifiers."""

    def __init__(self, encoder: MapsEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        # the residual stream of a transformer has no common scale: without the norm classifiers hardly learn
        self.neck = nn.Sequential(
            nn.Conv2d(encoder.widths[-1], encoder.dim, 1, bias=False), nn.BatchNorm2d(encoder.dim), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> features ``(B, dim, h, w)``."""
        features: Tensor = self.neck(self.encoder(images).maps[-1])
        return features

    def train(self, mode: bool = True) -> Self:
        """Set train or evaluation mode; frozen parts of the encoder keep their normalisation as it is."""
        super().train(mode)
        hold_frozen_norms(self.encoder)
        return self


def _encoder(
    encoder: VitShape | str,
    in_channels: int,
    input_size: int | None,
    weights: str | Path,
    double_class_embedding: bool,
    dim: int | None,
    stride: int,
) -> tuple[MapsEncoder, Weights]:
    if encoder == TINY:
        from perdure.networks.clip.tiny_encoder import TinyMapsEncoder

        if str(weights) != "random":
            raise UsageError(f"there are no weights for the encoder {TINY}", "leave network.weights out")
        return TinyMapsEncoder(dim or TINY_DIM, stride, in_channels=in_channels), Weights("random")
    if isinstance(encoder, str) and encoder not in PRESETS:
        from perdure.networks.clip.timm_encoder import TimmMapsEncoder

        cnn = TimmMapsEncoder(encoder, dim or TIMM_DIM, stride, in_channels=in_channels, weights=weights)
        return cnn, cnn.weights
    shape, crop = PRESETS[encoder] if isinstance(encoder, str) else (encoder, PRESETS["vit_b16"][1])
    if dim is not None and dim != shape.dim:
        raise UsageError(f"dim is {dim}, the transformer's joint space has length {shape.dim}", "leave dim out")
    vit = ClipEncoder(shape, input_size or crop, double_class_embedding=double_class_embedding, in_channels=in_channels)
    if str(weights) == "random":
        return vit, Weights("random")
    from perdure.networks.clip.weights import load_clip_weights

    return vit, load_clip_weights(vit, Path(weights))
