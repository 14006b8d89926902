"""Data sets that each label some of the structures in their volumes, one after another; and the same classes again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from perdure.config.build import check_recurring, method_class
from perdure.data.case import collate
from perdure.data.dataset import Draw
from perdure.data.preparation import Preparation
from perdure.data.source import Source
from perdure.errors import UsageError
from perdure.labels import label_space
from perdure.methods.losses import class_bce
from perdure.methods.options import Setup, TrainingOptions
from perdure.methods.training import make_optimizer
from perdure.networks.build import build_network
from perdure.seeds import derive_seed, seeded
from perdure.streams.partial_labels import DataSet, partial_labels
from perdure.streams.task import Stream, merged

NAMES = ("liver", "spleen", "vessel")
SIDE = 8
TRAINING = {"epochs": 12, "batch_size": 4, "optimizer": "adamw", "lr": 0.01, "later_lr": 0.003, "neck_lr": 1}
RATES = {"classifier_lr": 1, "new_classifier_lr": 10}


@dataclass(frozen=True)
class Torso(Source):
    """Volumes that all show three boxes, told apart by intensity; the labels name only some of them.

    ``gain`` multiplies all intensities: another scanner.
    """

    labelled: tuple[str, ...]
    gain: float = 1.0
    name = "torso"
    kind = "segmentation"
    patients = False
    other_label = 0

    @property
    def space(self) -> Any:
        return label_space(list(self.labelled))

    def names(self, split: str) -> list[str]:
        return [f"{split}{i}" for i in range(16 if split == "train" else 6)]

    def whole(self, split: str, name: str) -> Any:
        """Every structure, 1 to 3."""
        draw = np.random.default_rng(derive_seed(split, name, *self.labelled))
        mask = np.zeros((SIDE,) * 3, np.uint8)
        for structure, corner in enumerate(draw.permutation(8)[:3], 1):
            first = [4 * (int(corner) >> axis & 1) + int(draw.integers(2)) for axis in range(3)]
            mask[tuple(slice(at, at + 3) for at in first)] = structure
        return mask

    def mask(self, split: str, name: str) -> Any:
        table = np.zeros(4, np.uint8)
        for own, structure in enumerate(self.labelled, 1):
            table[1 + NAMES.index(structure)] = own
        return table[self.whole(split, name)]

    def image(self, split: str, name: str) -> Any:
        noise = np.random.default_rng(derive_seed("noise", split, name)).normal(0, 0.1, (1, SIDE, SIDE, SIDE))
        intensity = np.array([0.0, 1.0, -1.0, 2.0])[self.whole(split, name)]
        return (self.gain * intensity + noise).astype(np.float32)

    def fingerprint(self, split: str) -> str:
        return f"{split}-{self.labelled}-{self.gain}"


def stream_of(*sources: Torso, elsewhere: Any = "unlabelled") -> Stream:
    sets = [DataSet(source, f"set{number}") for number, source in enumerate(sources, 1)]
    return partial_labels(sets, preparation=Preparation(dims=3, channels=1), elsewhere=elsewhere)


ONE_BY_ONE = tuple(Torso((name,)) for name in NAMES)


@pytest.fixture
def taught(learn: Callable) -> Callable:
    """A method after all tasks of a stream, and the loss terms of its last training."""

    def run(name: str, stream: Stream, training: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
        kind = method_class(name)
        settings = TrainingOptions(**TRAINING | RATES | (training or {}))

        def network() -> Any:
            return build_network("residual_unet", 3, 1, widths=[8, 16], norm="group")

        with seeded(1):
            method = kind(Setup(kind.Options.model_validate(options), settings, network))  # type: ignore[call-arg]
        stream = merged(stream) if kind.sees_all_tasks else stream
        for task in stream.tasks:
            log = learn(method, stream, task.index)
        return method.eval(), log["train"]

    return run


def dice(method: Any, source: Torso, structures: tuple[str, ...] = NAMES) -> list[float]:
    """Dice of each structure over all test volumes, with every structure as the truth, in percent."""
    images = torch.stack([torch.from_numpy(source.image("test", name)) for name in source.names("test")])
    truth = np.stack([source.whole("test", name) for name in source.names("test")])
    with torch.no_grad():
        labels = method.predict(images).labels().numpy()
    found = []
    for structure in structures:
        a, b = labels == 1 + NAMES.index(structure), truth == 1 + NAMES.index(structure)
        found.append(200.0 * (a & b).sum() / max(1, a.sum() + b.sum()))
    return found


@pytest.mark.contract
@pytest.mark.parametrize(
    ("name", "options"),
    [("lwf", {}), ("lwf", {"form": "softmax"}), ("star", {}), ("independent", {}), ("joint", {}), ("finetune", {})],
)
def test_one_structure_after_another_in_three_dimensions(taught: Callable, name: str, options: dict[str, Any]) -> None:
    stream = stream_of(*ONE_BY_ONE)
    assert [task.new for task in stream.tasks] == [(1,), (2,), (3,)]
    method, _ = taught(name, stream, **options)
    found = dice(method, ONE_BY_ONE[0])
    assert found[2] > 85, "the last structure is not learned"
    if name == "finetune":  # masks taken at their word: what is not labelled is not there
        assert max(found[:2]) < 20
    else:
        assert min(found[:2]) > 75, "the earlier structures are forgotten"


@pytest.mark.contract
@pytest.mark.parametrize("name", ["finetune", "lwf", "joint", "independent"])
def test_the_same_structures_from_another_scanner(taught: Callable, name: str) -> None:
    one, two = Torso(NAMES), Torso(NAMES, gain=-0.7)
    stream = stream_of(one, two)
    assert [task.new for task in stream.tasks] == [(1, 2, 3), ()]
    method, _ = taught(name, stream)
    assert method.class_ids == (1, 2, 3)
    assert sum(dice(method, two)) > 75  # a network that has not seen this scanner finds nothing: 0
    if name != "independent":
        assert len(method.network.classifiers) == 1, "fewer classifiers than tasks"


@pytest.mark.contract
@pytest.mark.parametrize("name", ["star", "lwf"])
def test_a_structure_that_is_labelled_again(taught: Callable, name: str) -> None:
    sets = Torso(("liver", "spleen")), Torso(("spleen", "vessel"))
    stream = stream_of(*sets)
    assert [(task.new, set(task.annotated)) for task in stream.tasks] == [((1, 2), {1, 2}), ((3,), {2, 3})]
    liver, spleen, vessel = dice(taught(name, stream)[0], sets[1])
    assert min(liver, spleen) > 75
    assert vessel > 40


@pytest.mark.parametrize(
    ("name", "options", "sets", "said"),
    [
        ("star", {}, [NAMES, NAMES], "star learns new classes only; task 'set2' teaches none"),
        ("star", {}, [("liver",), ("spleen",)], None),
        ("star", {}, [("liver",), ("liver", "spleen")], None),
        ("finetune", {}, [NAMES, NAMES], None),
        ("finetune", {"channels": "new"}, [NAMES, NAMES], "task 'set2' teaches none"),
        ("ccsi_seg", {}, [("liver",), ("liver", "spleen")], "task 'set2' labels 'liver' again, which an earlier task"),
        ("lwf", {}, [NAMES, ("liver",)], None),
        ("independent", {}, [NAMES, NAMES], None),
    ],
)
def test_what_a_method_cannot_learn_is_refused_before_the_run(
    name: str, options: dict[str, Any], sets: list[tuple[str, ...]], said: str | None
) -> None:
    kind, dims = method_class(name), 2 if name == "ccsi_seg" else 3
    setup = Setup(
        kind.Options.model_validate(options),
        TrainingOptions(),
        lambda: build_network("residual_unet", dims, 1, widths=[4, 8], norm="group"),
    )
    stream = stream_of(*(Torso(labelled) for labelled in sets))
    method = kind(setup)  # type: ignore[arg-type]
    if said is None:
        check_recurring(name, method, stream)
        assert method.recurring != "refused" or not any(set(task.old) & task.annotated for task in stream.tasks)
        return
    with pytest.raises(UsageError) as error:
        check_recurring(name, method, stream)
    assert said in error.value.what
    assert "use lwf" in error.value.hint


@pytest.mark.parametrize(("name", "default"), [("finetune", "background"), ("joint", "left_out")])
def test_what_unlabelled_pixels_say(taught: Callable, name: str, default: str) -> None:
    assert method_class(name).Options().unlabelled == default  # type: ignore[attr-defined]
    stream = stream_of(*ONE_BY_ONE[:2])
    losses = {}
    for unlabelled in ("background", "left_out"):
        method, _ = taught(name, stream, {"epochs": 1}, unlabelled=unlabelled)
        shown = merged(stream) if method.sees_all_tasks else stream
        with shown.opened(shown.tasks[-1]) as task:
            batch = collate([task.train()[Draw(i, 0)] for i in range(2)])
        assert batch.annotated is not None
        logits = method.network(batch.images)[0]
        annotated = batch.annotated if unlabelled == "left_out" else None
        expected = class_bce(logits, batch.labels, (1, 2), 4.0, True, annotated).sum()
        losses[unlabelled] = method.loss(batch)["current"]
        torch.testing.assert_close(losses[unlabelled], expected)
    assert losses["background"] != losses["left_out"]


def test_labels_of_old_classes_take_the_place_of_the_old_network(taught: Callable, first_batch: Callable) -> None:
    sets = Torso(("liver", "spleen")), Torso(("spleen", "vessel"))
    stream = stream_of(*sets)
    method, _ = taught("star", stream, {"epochs": 4})
    task = stream.tasks[1]
    with stream.opened(task):
        batch = first_batch(method.phases(task)[0].data())
    with torch.no_grad():
        _, found = method._ask_old_network(batch)
        method.again = ()
        _, guessed = method._ask_old_network(batch)
    found, guessed = found[-1], guessed[-1]  # 0 for none, 1 for liver, 2 for spleen; the network's stride is 1
    assert torch.equal(found == 2, batch.labels == 2)
    assert not torch.equal(guessed == 2, batch.labels == 2)
    elsewhere = (batch.labels != 2) & (guessed != 2)
    assert torch.equal(found[elsewhere], guessed[elsewhere])
    # an image that does not annotate the class is left to the old network
    method.again = (2,)
    silent = batch._replace(annotated=batch.annotated.clone(), labels=batch.labels.where(batch.labels != 2, 0))
    silent.annotated[:, 2] = False
    with torch.no_grad():
        assert torch.equal(method._ask_old_network(silent)[1][-1], guessed)


def test_the_newest_classifier_learns_fast_only_where_it_is_new() -> None:
    network = build_network("residual_unet", 3, 1, widths=[4, 8], norm="group")
    network.grow(2)
    for grown, rate in ((True, 0.3), (False, 0.2)):
        settings = TrainingOptions(lr=0.1, later_lr=0.1, classifier_lr=2, new_classifier_lr=3)
        assert make_optimizer(network, settings, True, grown).param_groups[-1]["lr"] == pytest.approx(rate)
