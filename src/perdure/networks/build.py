"""Networks by name. The table imports nothing heavy; building imports torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from perdure.errors import UsageError, nearest
from perdure.foreign import is_foreign, load

if TYPE_CHECKING:
    from perdure.data.source import Kind
    from perdure.networks.network import Network


class NetworkEntry(NamedTuple):
    """Where the builder of a network is found, and what the network is for.

    Args:
        target: ``module:function`` that returns a :class:`perdure.networks.network.Network`; its keyword arguments are
            the options of the network.
        kind: What the labels describe that it is for.
        dims: Spatial dimensions it can be built for.
        summary: One line.
        source: Paper or other origin.
    """

    target: str
    kind: Kind
    dims: tuple[int, ...]
    summary: str
    source: str


NETWORKS: Final[dict[str, NetworkEntry]] = {
    "deeplab": NetworkEntry(
        "perdure.networks.deeplab:deeplab",
        "segmentation",
        (2,),
        "DeepLabV3 on any convolutional timm backbone, or on a tiny one for small images",
        "Chen et al. 2017, as used by STAR",
    ),
    "residual_unet": NetworkEntry(
        "perdure.networks.residual_unet:residual_unet",
        "segmentation",
        (2, 3),
        "small residual U-Net for images and volumes, features at full resolution",
        "-",
    ),
    "clip_segmenter": NetworkEntry(
        "perdure.networks.clip.segmenter:clip_segmenter",
        "segmentation",
        (2,),
        "CLIP's vision transformer, or another encoder, and an attention decoder of class queries from text",
        "CLIP-CISS, 2024",
    ),
    "unit_unet": NetworkEntry(
        "perdure.networks.unit_unet:unit_unet",
        "segmentation",
        (2,),
        "residual U-Net for images, 8.5 million parameters, features at full resolution",
        "CGR, MICCAI 2024",
    ),
    "cosine_resnet": NetworkEntry(
        "perdure.networks.cosine_resnet:cosine_resnet",
        "classification",
        (2,),
        "small or large residual net for whole images, Continual or batch normalisation, cosine head",
        "CCSI, MedIA 2024",
    ),
}
GIVEN = ("dims", "in_channels")  # what the data decides, not the recipe


def build_network(name: str, dims: int, in_channels: int, **options: object) -> Network:
    """Build a network without classifiers.

    Args:
        name: A name in ``NETWORKS``, or ``package.module:function`` for a builder of one's own.
        dims: Spatial dimensions of the data: 2 or 3.
        in_channels: Channels of the images.
        **options: Of the network, see :func:`network_options`.

    Raises:
        UsageError: The name, an option or a value is wrong, or the network has no such dimensions.
    """
    from pydantic import ValidationError, validate_call  # not for `perdure list`, which only reads the table

    from perdure.networks.network import Network

    entry, builder = _find(name)
    if entry is not None and dims not in entry.dims:
        fitting = ", ".join(n for n, e in NETWORKS.items() if dims in e.dims) or "none"
        raise UsageError(f"network '{name}' does not work in {dims}D", f"networks that do: {fitting}")
    known = network_options(name)
    for option in options:
        if option not in known:
            raise UsageError(f"network '{name}' has no option '{option}'", nearest(option, known))
    given = {"dims": dims, "in_channels": in_channels}  # a builder takes of these what it needs
    taken = {key: value for key, value in given.items() if key in inspect.signature(builder).parameters}
    try:
        # checks values against the builder's own annotations: there is no second list of types to keep up to date
        network = validate_call(builder)(**taken, **options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"network '{name}', option '{where}': {first['msg']}",
            f"got {first['input']!r}; default: {known.get(str(first['loc'][0]))!r}",
        ) from error
    if not isinstance(network, Network):
        raise UsageError(
            f"network '{name}' made a {type(network).__name__}, not a network",
            "a builder returns a perdure.networks.network.Network",
        )
    return network


def network_options(name: str) -> dict[str, object]:
    """Options of a network and their defaults.

    Raises:
        UsageError: There is no network of this name.
    """
    _, builder = _find(name)
    parameters = inspect.signature(builder).parameters
    return {key: value.default for key, value in parameters.items() if key not in GIVEN}


def _find(name: str) -> tuple[NetworkEntry | None, Callable[..., Network]]:
    """Entry and builder of a network; a builder of one's own has no entry."""
    entry = NETWORKS.get(name)
    target = entry.target if entry else name
    if not is_foreign(target):
        raise UsageError(f"unknown network '{name}'", f"{nearest(name, NETWORKS)}, or write package.module:function")
    return entry, cast("Callable[..., Network]", load(target, "network"))
