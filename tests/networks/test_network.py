"""The contract of networks, and scoring of some channels only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.errors import UsageError
from perdure.methods.options import Options, Setup, TrainingOptions
from perdure.methods.training import current_loss, grow, make_optimizer, scores
from perdure.networks.classifier import Classifier
from perdure.networks.network import GrowingNetwork, Network
from perdure.networks.segmenter import Segmenter
from perdure.streams.task import Task


class Generator(Network):
    """Noise -> image: a network without classes, with parts of its own."""

    def __init__(self) -> None:
        super().__init__(2, in_channels=1)
        self.text = nn.Embedding(4, 8)
        self.decoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))

    def forward(self, noise: Tensor) -> Tensor:
        self.check_images(noise)
        return self.decoder(noise)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"text": list(self.text.parameters()), "neck": list(self.decoder.parameters())}


def segmenter(dims: int) -> Segmenter:
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    return Segmenter(nn.Sequential(conv(3, 6, 4, 4), nn.ReLU()), 6, 4, dims, in_channels=3)


def classifier() -> Classifier:
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(body, 6, in_channels=3)


@pytest.mark.parametrize("size", [(16, 16), (13, 17)])
@pytest.mark.parametrize("make", [lambda: segmenter(2), lambda: segmenter(3), classifier], ids=["2d", "3d", "class"])
def test_scoring_in_parts_equals_scoring_at_once(make: Callable[[], GrowingNetwork], size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = make().eval()
    images = torch.randn(2, 3, *size, *size[: network.dims - 2])
    assert network.full_logits(images).shape[:2] == (2, 0), "before the first task"
    for classes in (3, 1, 4):
        network.grow(classes)
    encoded = network.encode(images)
    full = network.score(encoded)
    assert full.dtype == torch.float32
    assert torch.equal(full, network.full_logits(images))
    assert full.shape == ((2, 8, *images.shape[2:]) if network.kind == "segmentation" else (2, 8))
    assert encoded.size == tuple(images.shape[2:])
    for channels in ([], [0], [7, 0, 3], [4, 5, 6], list(range(8))):
        torch.testing.assert_close(network.score(encoded, channels), full[:, channels], rtol=0, atol=1e-6)
    newest = network.classify(encoded.features, first=-1, channels=[2, 0])
    torch.testing.assert_close(newest, network.classify(encoded.features)[:, [6, 4]], rtol=0, atol=1e-6)
    with pytest.raises(IndexError):
        network.score(encoded, [8])


def test_the_kind_of_label_belongs_to_the_class_of_the_network() -> None:
    assert (Segmenter.kind, Classifier.kind) == ("segmentation", "classification")


def test_any_network_fulfils_the_contract() -> None:
    network = Generator()
    assert network(torch.zeros(2, 1, 5, 7)).shape == (2, 1, 5, 7)
    assert network.compilable() == [network]
    assert (network.weights.source, network.least_batch) == ("random", 1)
    with pytest.raises(UsageError, match="1 channels, not 3"):
        network(torch.zeros(2, 3, 5, 7))
    with pytest.raises(UsageError, match="3 axes"):
        network.check_size((4, 4, 4))
    network.freeze_norm()
    network.train()
    assert network.decoder.training
    assert not network.decoder[1].training
    plain = Network(2)
    plain.weight = nn.Parameter(torch.ones(2))
    assert plain.parameter_groups() == {"network": [plain.weight]}
    assert plain.requires_grad_(False).parameter_groups() == {"network": []}


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dropout", [True, False])
def test_normalisation_and_dropout_are_frozen_each_by_its_own_setting(norm: bool, dropout: bool) -> None:
    body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network, training = Classifier(body, 6), TrainingOptions(freeze_norm=norm, freeze_dropout=dropout)
    for index, held in enumerate([(False, False), (norm, dropout)]):
        grow(network, Task(index, str(index), (index + 1,), (), frozenset()), training)
        network.train()
        assert (not body[1].training, not body[2].training) == held
        assert body[1].weight.requires_grad is not held[0]


def test_parts_without_a_setting_learn_at_the_base_rate() -> None:
    groups = make_optimizer(Generator(), TrainingOptions(lr=0.5, neck_lr=4.0), later=False).param_groups
    assert [group["lr"] for group in groups] == [0.5, 2.0]


@pytest.mark.parametrize(("later", "base"), [(False, 0.5), (True, 0.25)])
def test_the_scale_of_cosine_logits_has_a_rate_of_its_own(later: bool, base: float) -> None:
    network = classifier()
    network.grow(2)
    moved = []
    for factor in (None, 1.0, 30.0):
        given = {} if factor is None else {"scale_lr": factor}
        training = TrainingOptions(lr=0.5, later_lr=0.25, weight_decay=0, momentum=0, **given)
        trained = copy.deepcopy(network)
        optimizer = make_optimizer(trained, training, later)
        rate = next(g["lr"] for g in optimizer.param_groups if g["params"][0] is trained.head.scale)
        assert rate == base * (factor or 1.0)
        for parameter in trained.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append(trained)
    steps = [1.0 - trained.head.scale.item() for trained in moved]
    assert steps == pytest.approx([base, base, 30 * base]), "as fast as the backbone by default"
    for trained in moved:  # nothing else follows the factor
        assert torch.equal(trained.head.rows[0], moved[0].head.rows[0])
        assert torch.equal(trained.body[0].weight, moved[0].body[0].weight)


def test_a_growing_network_is_compiled_by_its_body() -> None:
    assert [network.compilable()[0] is network.body for network in (segmenter(2), classifier())] == [True, True]


def test_setup_builds_the_network_that_a_method_needs() -> None:
    setup = Setup(Options(), TrainingOptions(), classifier)
    assert isinstance(setup.network(Classifier), Classifier)
    assert isinstance(setup.network(GrowingNetwork), Classifier)
    with pytest.raises(UsageError, match="of type Segmenter, the recipe's is a Classifier") as caught:
        setup.network(Segmenter)
    assert "network.name" in caught.value.hint


def test_old_classifiers_are_frozen_whatever_they_are_made_of() -> None:
    for network in (segmenter(3), classifier()):
        for classes in (2, 3):
            network.grow(classes)
        network.freeze_old_classifiers()
        parts = network.classifier_parameters()
        assert [{p.requires_grad for p in part} for part in parts] == [{False}, {True}]
        kept = {id(p) for part in network.parameter_groups().values() for p in part}
        assert kept == {id(p) for p in network.parameters() if p.requires_grad}
        assert all(not {*map(id, a)} & {*map(id, b)} for a, b in pairwise(network.parameter_groups().values()))


class Decoders(GrowingNetwork[tuple[Tensor, ...]]):
    """An encoder of two levels and one decoder per task, as in a U-Net with one head per data set."""

    kind = "segmentation"

    def __init__(self) -> None:
        super().__init__(Pyramid(), 4, 3, in_channels=1)
        self.decoders = nn.ModuleList()

    def classify(self, features: tuple[Tensor, ...], first: int = 0, channels: Sequence[int] | None = None) -> Tensor:
        fine, coarse = features
        joined = torch.cat([fine, nn.functional.interpolate(coarse, size=fine.shape[2:])], 1)
        logits = torch.cat([decoder(joined) for decoder in self.decoders[first:]], 1)
        return logits if channels is None else logits[:, list(channels)]

    def grow(self, classes: int) -> None:
        self.decoders.append(nn.Sequential(nn.Conv3d(8, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, classes, 1)))

    def classifier_parameters(self) -> list[list[nn.Parameter]]:
        return [list(decoder.parameters()) for decoder in self.decoders]


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 4, 2, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        fine = self.fine(images)
        return fine, self.coarse(fine)


class TextTable(GrowingNetwork[Tensor]):
    """Classes are rows of a table of texts; the body alone learns."""

    kind = "segmentation"

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 1), 5, 2)
        self.register_buffer("texts", torch.empty(0, 5))
        self.starts: list[int] = []

    def classify(self, features: Tensor, first: int = 0, channels: Sequence[int] | None = None) -> Tensor:
        logits = torch.einsum("nd...,kd->nk...", features, self.texts[self.starts[first] :])
        return logits if channels is None else logits[:, list(channels)]

    def grow(self, classes: int) -> None:
        self.starts.append(len(self.texts))
        self.texts = torch.cat([self.texts, torch.randn(classes, 5)])

    def classifier_parameters(self) -> list[list[nn.Parameter]]:
        return []


@pytest.mark.parametrize(("make", "shape"), [(Decoders, (2, 1, 4, 4, 4)), (TextTable, (2, 3, 4, 4))])
def test_unlike_networks_learn_and_predict_as_the_others_do(
    make: Callable[[], GrowingNetwork], shape: tuple[int, ...]
) -> None:
    """What fine-tuning does with a network: grow, freeze, loss, optimiser, scores in parts."""
    torch.manual_seed(0)
    network, settings = make(), TrainingOptions(lr=0.1)
    network.grow(2)
    network.grow(1)
    network.freeze_old_classifiers()
    images = torch.randn(shape)
    labels = torch.randint(0, 4, (2, *shape[2:]))
    batch = Batch(images, labels, ("a", "b"), torch.zeros(2, dtype=torch.long))
    before = [p.clone() for p in network.parameters()]
    optimizer = make_optimizer(network, settings, later=True)
    current_loss(network, batch, (3, 1, 2), settings).backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
    assert moved == [p.requires_grad for p in network.parameters()]
    predicted = scores(network, images, (3, 1, 2))
    assert predicted.scores().shape == (2, 4, *shape[2:])
    assert torch.equal(predicted.score([3, 1]), predicted.scores()[:, [3, 1]])
    assert predicted.held_bytes == network.encode(images).nbytes > 0
