"""CLIP-CISS as a method: which classes learn, what is held, what is kept, and what a name is good for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from perdure.data.case import Batch
from perdure.errors import DataError, UsageError
from perdure.labels import TABLE_SIZE, label_space
from perdure.methods.clip_ciss.clip_ciss import ClipCiss
from perdure.methods.clip_ciss.options import ClipCissOptions
from perdure.methods.finetune import Finetune, FinetuneOptions
from perdure.methods.options import Setup, TrainingOptions
from perdure.networks.clip.encoder import VitShape
from perdure.networks.clip.segmenter import ClipSegmenter, clip_segmenter
from perdure.networks.clip.text import TextTable, hash_vectors
from perdure.networks.network import GrowingNetwork
from perdure.networks.weights import Weights
from perdure.streams.task import Task

SHAPE = VitShape(patch=8, width=16, depth=3, heads=2, dim=16, feature_blocks=(0, 1, 2))
SPACE = label_space(["cat", "dog", "cow", "hen", "bee"])
FIRST = Task(0, "a", (4, 1, 2), (), frozenset({1, 2, 4}), space=SPACE)
SECOND = Task(1, "b", (3, 5), (4, 1, 2), frozenset({3, 5}), space=SPACE)


def small(**options: Any) -> ClipSegmenter:
    torch.manual_seed(0)
    return clip_segmenter(SHAPE, input_size=32, layers=1, heads=2, dropout=0.0, **options)


def method(network: ClipSegmenter | None = None, **options: Any) -> ClipCiss:
    training = TrainingOptions(optimizer="adamw", lr=1e-3, weight_decay=0.01)
    return ClipCiss(Setup(ClipCissOptions(**options), training, lambda: network or small()))


def test_a_restored_model_does_not_read_names_by_other_means_than_before() -> None:
    """Nothing is loaded into its network, but its names were read by the file that the recipe gives."""
    setup = Setup(ClipCissOptions(), TrainingOptions(), small, weights="gone.pt")
    learner = ClipCiss(setup)
    assert learner.network.weights.source == "random"
    learner.begin(FIRST)
    with pytest.raises(DataError, match=r"gone\.pt does not exist"):
        learner.add_names({3: "cow"})


def test_names_of_later_tasks_are_read_by_the_weights_that_read_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the same name may have been replaced; vectors of two text encoders lie in two spaces."""
    digest = "11" * 32

    def table(names: list[str], source: object, *, dim: int, **_: object) -> TextTable:
        return TextTable(tuple(names), hash_vectors(names, dim), (), Weights(str(source), digest), digest)

    monkeypatch.setattr("perdure.methods.clip_ciss.clip_ciss.text_table", table)
    learner = method(text="clip.pt")
    learner.begin(FIRST)
    learner.phases(FIRST)
    learner.add_names({5: "bee"})
    digest = "22" * 32
    learner.begin(SECOND)
    with pytest.raises(DataError, match=r"clip\.pt is not the text encoder that read the names of earlier classes"):
        learner.phases(SECOND)
    digest = "11" * 32
    learner.phases(SECOND)
    assert learner.text.shape == (5, 16)


def batch(labels: torch.Tensor, annotated: torch.Tensor | None = None) -> Batch:
    images = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return Batch(images, labels, ("",) * len(labels), annotated=annotated)


def squares(*ids: int) -> torch.Tensor:
    """One square of a class per image."""
    labels = torch.zeros(len(ids), 32, 32, dtype=torch.long)
    labels[:, 4:24, 8:28] = torch.tensor(ids)[:, None, None]
    return labels


def later(**options: Any) -> ClipCiss:
    """In the second task, moved away from the model before it."""
    learner = method(**options)
    learner.begin(FIRST)
    learner.phases(FIRST)
    learner.begin(SECOND)
    learner.phases(SECOND)
    with torch.no_grad():
        for parameter in learner.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return learner


def test_rows_of_text_follow_the_order_of_the_classes():
    learner = later()
    assert torch.equal(learner.text, hash_vectors(["hen", "cat", "dog", "cow", "bee"], 16))
    item, source = learner.kept()
    assert item.keys == ("text",) and item.per_class and "text" in learner.state_dict()
    assert source.keys == ("text_source",) and source.kind == "statistics"


def test_names_come_from_a_file_where_the_recipe_says_so(tmp_path):
    (tmp_path / "names.txt").write_text("tom\nrex\nelsa\nhenny\nmaya\n")
    learner = method(names=str(tmp_path / "names.txt"))
    learner.begin(FIRST)
    learner.phases(FIRST)
    assert torch.equal(learner.text, hash_vectors(["henny", "tom", "rex"], 16))
    (tmp_path / "short.txt").write_text("tom\nrex\n")
    learner = method(names=str(tmp_path / "short.txt"))
    learner.begin(FIRST)
    with pytest.raises(UsageError, match="has 2 names, the data set a class 5"):
        learner.phases(FIRST)


def test_names_that_read_alike_are_refused():
    learner = method()
    twice = replace(FIRST, space=label_space(["cat", "Cat ", "cow", "hen", "bee"]))
    with pytest.raises(UsageError, match="both called"):
        learner.begin(twice)


def test_only_the_classes_of_the_task_get_gradients_from_labels():
    learner = later(gpd=0, qd=0)
    seen: dict[str, torch.Tensor] = {}
    forward = learner.network.forward

    def spied(images: torch.Tensor, text: torch.Tensor) -> Any:
        said = forward(images, text)
        seen["presence"] = said.presence
        seen["presence"].retain_grad()
        return said

    learner.network.forward = spied  # type: ignore[method-assign]
    terms = learner.loss(batch(squares(3, 5, 3)))
    assert set(terms) == {"presence", "focal", "dice"}
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert not seen["presence"].grad[:, :3].any() and seen["presence"].grad[:, 3:].all()  # type: ignore[index]


def test_terms_of_both_tasks_and_their_weights():
    learner = later()
    terms = learner.loss(batch(squares(3, 5)))
    assert set(terms) == {"presence", "focal", "dice", "gpd", "qd"}
    assert all(float(value.detach()) > 0 for value in terms.values())
    assert set(later(presence=False, qd=0).loss(batch(squares(3, 5)))) == {"focal", "dice", "gpd"}
    learner = method()
    learner.begin(FIRST)
    learner.phases(FIRST)
    assert set(learner.loss(batch(squares(1, 2)))) == {"presence", "focal", "dice"}


def test_distillation_of_an_unchanged_model():
    """GPD is nearly 0; QD is not, for the new queries are attended to by the old ones."""
    learner = method()
    learner.begin(FIRST)
    learner.phases(FIRST)
    learner.begin(SECOND)
    learner.phases(SECOND)
    terms = learner.eval().loss(batch(squares(3, 5)))
    assert float(terms["gpd"].detach()) == pytest.approx(0, abs=1e-5)
    assert 0 < float(terms["qd"].detach()) < 0.5


def test_the_first_task_preserves_a_pretrained_encoder_only():
    network = small()
    network.weights = Weights("somewhere.pt", "0" * 64)
    learner = method(network, text="hash")
    learner.begin(FIRST)
    learner.phases(FIRST)
    terms = learner.loss(batch(squares(1, 2)))
    assert float(terms["gpd"].detach()) == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for parameter in network.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    terms = learner.loss(batch(squares(1, 2)))
    assert float(terms["gpd"].detach()) > 1e-4
    assert len(list(learner.parameters())) == len(list(network.parameters())), "the frozen copy is no part of it"


def test_teachers_get_no_gradient():
    learner = later()
    sum(learner.loss(batch(squares(3, 5))).values()).backward()  # type: ignore[union-attr]
    assert learner.previous is not None
    assert all(p.grad is None for p in learner.previous.module.parameters())
    assert not learner.text.requires_grad


def test_classes_that_an_image_does_not_annotate_are_not_called_absent():
    learner = later(gpd=0, qd=0)
    labels = squares(3, 5)
    told = torch.zeros(2, TABLE_SIZE, dtype=torch.bool)
    told[0, [0, 3]], told[1, [0, 5]] = True, True
    said = learner.network.eval()(batch(labels).images, learner.text)
    known = torch.stack([said.presence[0, 3], said.presence[1, 4]])
    wanted = 5 * F.cross_entropy(known, torch.tensor([0, 0]))
    found = learner.eval().loss(batch(labels, told))["presence"]
    torch.testing.assert_close(found, wanted)


def test_a_class_that_comes_back_learns_from_labels_and_is_not_held():
    learner = method()
    learner.begin(FIRST)
    learner.phases(FIRST)
    learner.begin(replace(SECOND, annotated=frozenset({1, 3, 5})))
    assert learner.learning == [1, 3, 4] and learner.held == [0, 2]


def test_scores_of_some_classes_are_those_of_all():
    learner = later().eval()
    images = torch.randn(2, 3, 30, 41)  # no multiple of the patch
    prediction = learner.predict(images)
    whole = prediction.scores()
    assert whole.shape == (2, 6, 30, 41) and prediction.class_ids == (0, 4, 1, 2, 3, 5)
    assert torch.equal(whole[:, 0], torch.full((2, 30, 41), 0.5))
    torch.testing.assert_close(prediction.score([4, 0, 1]), whole[:, [4, 0, 1]])
    bare = later(background="none").eval().predict(images)
    assert bare.class_ids == (4, 1, 2, 3, 5)
    without = later(presence=False, background="none").eval().predict(images).scores()
    assert (without >= bare.scores()).all()


def test_the_published_score_is_presence_times_mask():
    learner = later(background="none").eval()
    images = torch.randn(1, 3, 32, 32)
    said = learner.network(images, learner.text)
    full = F.interpolate(said.decoded.masks[-1], (32, 32), mode="bilinear", align_corners=False)
    wanted = said.presence.softmax(-1)[..., :1, None] * full.sigmoid()
    torch.testing.assert_close(learner.predict(images).scores(), wanted)


def test_a_class_is_predicted_from_its_name_before_it_is_learned():
    learner = later().eval()
    images = torch.randn(1, 3, 32, 32)
    learner.add_names({9: "horse"})
    prediction = learner.predict(images)
    assert prediction.class_ids == (0, 4, 1, 2, 3, 5, 9)
    rows = torch.cat([learner.text, hash_vectors(["horse"], 16)])
    assert torch.equal(
        learner.network(images, rows).decoded.masks[-1].shape and prediction.scores()[:, 6] > 0,
        torch.ones(1, 32, 32, dtype=torch.bool),
    )
    assert "named" not in learner.state_dict()
    with pytest.raises(UsageError, match="both called"):
        learner.add_names({10: "cat"})
    learner.begin(SECOND)
    assert learner.class_ids == SECOND.seen and not len(learner.named)


def test_methods_without_names_say_so():
    learner = Finetune(Setup(FinetuneOptions(), TrainingOptions(), small))
    with pytest.raises(UsageError, match="cannot predict 'horse'"):
        learner.add_names({9: "horse"})


def test_other_methods_train_classifiers_on_the_same_encoder():
    learner = Finetune(Setup(FinetuneOptions(), TrainingOptions(), small))
    assert isinstance(learner.network, GrowingNetwork)
    learner.begin(FIRST)
    labels = squares(1, 2)
    images = batch(labels).images
    assert learner.network.classify(learner.network.features(images)).shape == (2, 3, 4, 4)
    assert learner.predict(torch.randn(1, 3, 30, 41)).scores().shape == (1, 4, 30, 41)
    learner.loss(batch(labels))["current"].backward()
    assert all(p.grad is not None for p in learner.network.body.neck.parameters())  # type: ignore[union-attr]


def test_groups_of_the_optimiser():
    """Specification 1.5: the decoder learns ten times faster, norms do not decay."""
    learner = method()
    learner.begin(FIRST)
    (phase,) = learner.phases(FIRST)
    optimizer = phase.optimizer()  # type: ignore[union-attr]
    found = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [(1e-3, 0.01), (1e-3, 0.0), (pytest.approx(1e-2), 0.01), (pytest.approx(1e-2), 0.0)]
    counted = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert counted == sum(p.numel() for p in learner.network.parameters())


def test_a_decoder_trains_alone_where_memory_is_short():
    learner = method(small(train="decoder"))
    learner.begin(FIRST)
    learner.phases(FIRST)
    sum(learner.loss(batch(squares(1, 2))).values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in learner.network.encoder.parameters())
    assert all(p.grad is not None for p in learner.network.decoder.parameters())


@pytest.mark.parametrize(("train", "terms"), [("all", {"gpd", "qd"}), ("decoder", {"qd"})])
def test_relations_of_an_encoder_that_stays_as_it_is_need_no_teacher(train, terms):
    learner = method(small(train=train))
    for task in (FIRST, SECOND):
        learner.begin(task)
        learner.phases(task)
    assert set(learner.loss(batch(squares(3, 5)))) == {"presence", "focal", "dice"} | terms
    learner = method(small(train=train), qd=0)
    for task in (FIRST, SECOND):
        learner.begin(task)
    assert (learner.previous is None) is (train == "decoder")


@pytest.mark.parametrize("named", [True, False])
def test_normalisation_of_a_frozen_encoder_stays_as_it_is(named):
    """Also under methods that train classifiers on it: running means are part of the features."""
    network = clip_segmenter("tiny_resnet", stride=4, layers=1, heads=4, train="decoder")
    learner: ClipSegmenter | GrowingNetwork = network if named else network.with_classifiers()
    norm = next(part for part in network.encoder.modules() if isinstance(part, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    learner.train()
    network.encoder(torch.randn(2, 3, 32, 32))
    assert torch.equal(norm.running_mean, before) and learner.training
