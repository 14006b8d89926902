"""CCSI's phases and what they leave behind, on pictures small enough to look through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perdure.data.case import Batch
from perdure.data.dataset import Dataset
from perdure.data.preparation import Preparation
from perdure.data.sampling import Batches, Mix
from perdure.data.source import Source
from perdure.engine.phases import Collect, Generate, Train
from perdure.errors import UsageError
from perdure.files import write_tensors
from perdure.labels import IGNORE, TABLE_SIZE, label_space
from perdure.methods.ccsi.ccsi import WORKING, Ccsi
from perdure.methods.ccsi.memorisation import Neighbours
from perdure.methods.ccsi.memory import Memory, append_rows, class_sums, mean_directions, mean_images
from perdure.methods.options import Setup, TrainingOptions
from perdure.networks.cosine_resnet import cosine_resnet
from perdure.seeds import derive_seed, seeded
from perdure.streams.class_incremental import class_incremental
from perdure.streams.task import Stream

Read = Callable[[Batches | Mix], Iterator[Batch]]
QUICK = {"per_class": 8, "previews": 3, "synthesis": {"steps": 4, "warmup": 2, "group_size": 8, "groups_at_once": 2}}


class Patterns(Source):
    """Grey pictures of four classes; sample i is of class 1 + i % 4, darker with its number."""

    name, kind, patients, other_label = "patterns", "classification", False, 0
    space = label_space(["a", "b", "c", "d"], background=None)

    def names(self, split: str) -> list[str]:
        return [str(i) for i in range(16 if split == "train" else 8)]

    def mask(self, split: str, name: str) -> np.ndarray:
        return np.asarray(1 + int(name) % 4, np.uint8)

    def image(self, split: str, name: str) -> np.ndarray:
        kind, shade = int(name) % 4, 1 - int(name) / 32
        y, x = np.mgrid[:32, :32]
        pattern = (x // 4 % 2, y // 4 % 2, (x + y) // 4 % 2, x * 0 + 1)[kind]
        noise = np.random.default_rng(derive_seed(split, name)).uniform(0, 0.1, (1, 32, 32))
        return (0.9 * shade * pattern[None] + noise).astype(np.float32)

    def fingerprint(self, split: str) -> str:
        return f"patterns-{split}"


def stream(**options: Any) -> Stream:
    return class_incremental(Patterns(), base=2, step=2, preparation=Preparation(), **options)  # type: ignore[arg-type]


def method(network: dict[str, Any] | None = None, **options: Any) -> Ccsi:
    training = TrainingOptions(epochs=1, batch_size=4, lr=0.01, momentum=0, freeze_norm=False)
    with seeded(1):
        chosen = Ccsi.Options.model_validate(QUICK | options)
        return Ccsi(Setup(chosen, training, lambda: cosine_resnet(1, **(network or {}))))


class Progress:
    saved = None

    def checkpoint(self, *_: Any) -> None:
        pass


@pytest.fixture
def learn(tmp_path: Path, read: Read) -> Callable[..., dict[str, Any]]:
    """Run a task's phases without an engine; what the training phase saw, by name."""

    def run(learner: Ccsi, tasks: Stream, index: int) -> dict[str, Any]:
        task, seen = tasks.tasks[index], {}
        with tasks.opened(task):
            learner.begin(task)
            for phase in learner.phases(task):
                seen[phase.name] = PLAY[type(phase)](phase, learner, tmp_path / f"{index}-{phase.name}", read)
        return seen

    return run


def _train(phase: Train, learner: Ccsi, _: Path, read: Read) -> dict[str, Any]:
    batches = phase.data()
    optimizer = phase.optimizer()
    learner.train()
    losses, centroids, first = [], [], next(read(batches))
    for step, batch in enumerate(read(batches)):
        terms = phase.loss(batch)
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({k: float(v.detach()) for k, v in terms.items()})
        centroids.append(learner.centroids)
        phase.after_step(step)
        centroids.append(learner.centroids)
    replayed = (learner.replay_images, learner.replay_labels)
    assert learner.replayed == (0 if learner.replay_labels is None else len(learner.replay_labels))
    phase.finish()
    return {"batches": batches, "losses": losses, "replayed": replayed, "centroids": centroids, "first": first}


def _collect(phase: Collect, learner: Ccsi, _: Path, read: Read) -> None:
    learner.eval()
    totals: dict[str, Tensor] = {}
    with torch.no_grad():
        for batch in read(phase.data()):
            for key, value in phase.measure(batch).items():
                totals[key] = totals[key] + value if key in totals else value
    phase.finish(totals)


def _generate(phase: Generate, learner: Ccsi, folder: Path, _: Read) -> int:
    learner.eval()
    paths = [folder / f"{i}.safetensors" for i in range(phase.count)]
    for index, path in enumerate(paths):
        write_tensors(path, phase.make(index, Progress()))
    phase.finish(paths)
    return phase.count


PLAY: dict[type, Callable[..., Any]] = {Train: _train, Collect: _collect, Generate: _generate}


def test_a_whole_stream_keeps_statistics_only(learn: Callable) -> None:
    learner, tasks = method(), stream()
    for index in range(2):
        seen = learn(learner, tasks, index)
    assert list(seen) == ["classes", "impressions", "train", "moments", "next impressions", "neighbours"]
    assert {item.kind for item in learner.kept()} == {"statistics", "preview"}
    state = learner.state_dict()
    kept = {key for item in learner.kept() for key in item.keys}
    assert {key for key in state if not key.startswith("network.")} == kept
    assert all(getattr(learner, name) is None for name in WORKING)
    assert state["memory.means"].shape == (4, 1, 32, 32) and state["memory.means"].dtype == torch.uint8
    assert state["memory.preview"].shape == (4, 3, 1, 32, 32)
    assert learner.memory.impressions is not None and learner.memory.impressions.shape[0] == 4
    assert learner.predict(torch.rand(2, 1, 32, 32)).class_ids == (1, 2, 3, 4)


def test_means_are_those_of_the_training_images_to_the_bit(learn: Callable) -> None:
    learner, tasks, source = method(), stream(), Patterns()
    learn(learner, tasks, 0)
    for row, class_id in enumerate((1, 2)):
        mine = [source.image("train", n) for n in source.names("train") if int(source.mask("train", n)) == class_id]
        expected = np.round(np.mean(np.stack(mine).astype(np.float64), 0) * 255).clip(0, 255)
        assert np.array_equal(learner.memory.means[row].numpy(), expected.astype(np.uint8))


def test_impressions_made_early_are_the_ones_replayed_also_after_a_restart(learn: Callable) -> None:
    learner, tasks = method(), stream()
    learn(learner, tasks, 0)
    early = dict(learner._early)
    state = {key: value.clone() for key, value in learner.state_dict().items()}
    assert sorted(early) == [(1, 0)]
    replayed = learn(learner, tasks, 1)["train"]["replayed"]
    assert torch.equal(replayed[0], early[1, 0]["images"]) and torch.equal(replayed[1], early[1, 0]["labels"])
    from perdure.engine.state import restore

    again = method()
    again.begin(tasks.tasks[0])
    restore(again, state)
    fresh = learn(again, tasks, 1)["train"]["replayed"]
    assert torch.equal(fresh[0], replayed[0]) and torch.equal(fresh[1], replayed[1])


def test_the_update_draws_old_and_new_in_the_wanted_share(learn: Callable) -> None:
    learner, tasks = method(share=0.75, replacement=True), stream()
    learn(learner, tasks, 0)
    batches = learn(learner, tasks, 1)["train"]["batches"].parts[0]
    # 8 new images of weight 1, 16 impressions of weight 8 * 0.75 / (16 * 0.25) = 1.5; draws = 8 / 0.25
    assert batches.weights.tolist() == [1.0] * 8 + [1.5] * 16
    assert float(batches.weights[8:].sum() / batches.weights.sum()) == pytest.approx(0.75)
    assert batches.draws == 32 and not batches.drop_last


def test_every_batch_has_the_exact_share(learn: Callable) -> None:
    learner, tasks = method(share=0.75), stream()
    learn(learner, tasks, 0)
    seen = learn(learner, tasks, 1)["train"]
    mix, batch = seen["batches"], seen["first"]
    # of 4 labelled images 3 are replayed; 8 new images make 8 steps, as 8 / 0.25 draws in batches of 4 do
    assert [part.size for part in mix.parts] == [1, 4, 3] and mix.steps() == 8
    assert set(batch.of(0).labels.tolist()) <= {3, 4} and set(batch.of(2).labels.tolist()) <= {1, 2}
    assert all(part.weights is None for part in mix.parts) and len(mix.parts[2].samples) == 16


def test_every_loss_can_be_switched_off(learn: Callable) -> None:
    for off in ({"lambda_lf": 0}, {"lambda_margin": 0}, {"lambda_idc": 0}, {"replay": "none", "lambda_idc": 0}):
        learner, tasks = method(checked="none", **off), stream()
        assert set(learn(learner, tasks, 0)["train"]["losses"][0]) == {"ce"}
        seen = learn(learner, tasks, 1)["train"]
        gone = {"lambda_lf": "lf", "lambda_margin": "margin", "lambda_idc": "idc"}
        expected = {"ce", "lf", "margin", "idc"} - {gone[key] for key in off if key in gone}
        assert set(seen["losses"][0]) == expected - ({"margin"} if "replay" in off else set())
        parts = len(seen["batches"].parts) if isinstance(seen["batches"], Mix) else 1
        assert parts == 1 + ("lambda_idc" not in off) + ("replay" not in off)
        assert all(np.isfinite(list(terms.values())).all() for terms in seen["losses"])


def test_centroids_start_again_with_every_epoch(learn: Callable) -> None:
    learner, tasks = method(), stream()
    learn(learner, tasks, 0)
    seen = learn(learner, tasks, 1)["train"]
    per_epoch = seen["batches"].steps()
    after_loss, after_step = seen["centroids"][0::2], seen["centroids"][1::2]
    assert all(c is not None and c.shape == (2, 4, 4) and not c.requires_grad for c in after_loss)
    assert [c is None for c in after_step] == [(i + 1) % per_epoch == 0 for i in range(len(after_step))]


def test_the_unlabelled_pass_moves_statistics_only_where_asked(learn: Callable) -> None:
    moved = []
    for moves in (False, True):
        learner, tasks = method(idc_moves_statistics=moves, network={"norm": "continual"}), stream()
        learn(learner, tasks, 0)
        task = tasks.tasks[1]
        with tasks.opened(task):
            learner.begin(task)
            learner.train()
            images = torch.rand(4, 1, 32, 32)
            labels, parts = torch.tensor([3, 4, 3, 4]), torch.tensor([0, 0, 0, 0])
            both = Batch(torch.cat([images, 1 - images]), labels.repeat(2), ("",) * 8, torch.cat([parts, parts + 1]))
            before = {k: v.clone() for k, v in learner.network.named_buffers()}
            learner.network(images)
            once = {k: v.clone() for k, v in learner.network.named_buffers()}
            learner.network.load_state_dict(before, strict=False)
            learner.loss(both)
            twice = dict(learner.network.named_buffers())
            moved.append(any(not torch.equal(once[key], twice[key]) for key in once))
    assert moved == [False, True]


def test_old_rows_stay_and_new_ones_are_imprinted(learn: Callable, read: Read) -> None:
    learner, tasks = method(), stream()
    learn(learner, tasks, 0)
    old = learner.network.head.rows[0].detach().clone()
    learn(learner, tasks, 1)
    assert torch.equal(learner.network.head.rows[0], old)
    again, tasks = method(), stream()
    learn(again, tasks, 0)
    task = tasks.tasks[1]
    with tasks.opened(task), torch.no_grad():
        again.begin(task)
        again.eval()
        _collect(again.phases(task)[0], again, Path(), read)
        batch = next(read(Batches(task.train(), 8)))
        features = torch.nn.functional.normalize(again.network.features(batch.images), dim=1)
        for row, class_id in enumerate((3, 4)):
            mean = features[batch.labels == class_id].mean(0)
            cosine = torch.cosine_similarity(mean, again.network.head.rows[1][row], 0)
            assert float(cosine) == pytest.approx(1, abs=1e-5)
    lengths = again.network.head.rows[1].norm(dim=1)
    before = again.network.head.rows[0].norm(dim=1).mean()
    torch.testing.assert_close(lengths, before.expand(2))


def test_means_alone_stand_in_for_impressions(learn: Callable) -> None:
    learner, tasks = method(replay="means"), stream()
    learn(learner, tasks, 0)
    images, labels = learn(learner, tasks, 1)["train"]["replayed"]
    assert labels.bincount().tolist() == [8, 8]
    assert torch.equal(images, learner.memory.means[labels].float() / 255)
    assert [item.name for item in learner.kept()] == ["means"]


def test_statistics_that_the_network_lacks_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match="no Continual Normalization"):
        method(network={"norm": "batch"})
    method(network={"norm": "batch"}, synthesis={**QUICK["synthesis"], "statistics": "none"})


def test_images_of_another_range_are_refused() -> None:
    with pytest.raises(UsageError, match="grey values from 0 to 1"):
        class_sums(torch.full((1, 1, 2, 2), -0.5), torch.tensor([0]), 1)


def test_class_sums_by_hand() -> None:
    images = torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1, 1)
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 4.0]])
    sums = class_sums(images, torch.tensor([0, 0, 1]), 3, features)
    assert sums["counts"].tolist() == [2, 1, 0]
    assert mean_images(sums).flatten().tolist() == [102, 255, 0]  # 0.4 * 255, 1 * 255
    half = 0.5**0.5
    torch.testing.assert_close(mean_directions(sums), torch.tensor([[half, half], [0.6, 0.8], [0.0, 0.0]]))


# The pool of unlabelled images ----------------------------------------------------------------------------------


def test_a_pool_that_the_stream_does_not_grant_is_refused(learn: Callable) -> None:
    with pytest.raises(UsageError, match="grants no unlabelled images"):
        learn(method(idc_source="pool"), stream(), 0)


def test_test_images_need_the_compat_switch(learn: Callable, caplog: pytest.LogCaptureFixture) -> None:
    tasks = stream(pool="test")
    assert "transductive" in tasks.protocol
    with pytest.raises(UsageError, match="test images would take part"):
        learn(method(idc_source="pool"), tasks, 0)
    learner = method(idc_source="pool", compat=("transductive",))
    learn(learner, tasks, 0)
    assert "transductive" in caplog.text
    unlabelled = learn(learner, tasks, 1)["train"]["first"].of(1)
    assert set(unlabelled.labels.tolist()) == {IGNORE}


def test_a_validation_pool_shows_images_of_all_seen_classes(learn: Callable) -> None:
    learner, tasks = method(idc_source="pool"), stream(pool="val")
    learn(learner, tasks, 0)
    unlabelled = learn(learner, tasks, 1)["train"]["first"].of(1)
    assert set(unlabelled.labels.tolist()) == {IGNORE} and len({int(n) % 4 for n in unlabelled.names}) > 2


# Memory and neighbours ------------------------------------------------------------------------------------------


def test_rows_of_unequal_length_are_filled_up() -> None:
    impressions = append_rows(append_rows(None, torch.tensor([[0.1, 0.2]])), torch.tensor([[0.4]]))
    reference = append_rows(append_rows(None, torch.tensor([[0.3]])), torch.tensor([[0.5, 0.6]]))
    assert impressions.nan_to_num(-1).tolist() == [pytest.approx([0.1, 0.2]), pytest.approx([0.4, -1])]
    assert reference.nan_to_num(-1).tolist() == [pytest.approx([0.3, -1]), pytest.approx([0.5, 0.6])]


def test_previews_are_the_first_of_each_class_and_black_where_there_is_none() -> None:
    memory, images = Memory(), torch.arange(4).view(4, 1, 1, 1) / 4
    memory.show(images, torch.tensor([0, 2, 0, 0]), 3, 2)
    assert memory.preview.flatten(1).tolist() == [[0, 128], [0, 0], [64, 0]]


def test_the_nearest_training_image_is_found_and_a_copy_has_no_distance(read: Read) -> None:
    source = Patterns()
    view = Dataset(source, "train", tuple(source.names("train")), np.arange(TABLE_SIZE, dtype=np.int16), Preparation())
    copy = torch.from_numpy(source.image("train", "4"))  # class 1
    far = torch.full_like(copy, 0.5)
    neighbours = Neighbours(torch.stack([copy, far]), torch.tensor([0, 1]), view, (1, 2, 3, 4))
    sums: dict[str, Tensor] = {}
    for batch in read(Batches(view, 5)):
        for key, value in neighbours.measure(batch).items():
            sums[key] = sums[key] + value if key in sums else value
    impressions, reference = neighbours.distances(sums)
    assert impressions[0, 0] == 0
    others = [torch.from_numpy(source.image("train", str(i))) for i in range(1, 16, 4)]
    nearest = min(float((far - other).square().mean().sqrt()) for other in others)
    assert float(impressions[1, 0]) == pytest.approx(nearest, abs=1 / 1024)
    assert bool(impressions[2:].isnan().all())
    assert reference.shape == (4, 4) and float(reference.min()) > 0  # an image is not its own neighbour


def test_moments_of_single_images_are_named_in_the_ledger(learn: Callable) -> None:
    synthesis = {**QUICK["synthesis"], "statistics": "position", "group_size": 4}
    learner, tasks = method(network={"group_statistics": True}, synthesis=synthesis, checked="none"), stream()
    learn(learner, tasks, 0)
    item = learner.kept()[-1]
    assert item.name == "group-statistics" and "single image" in item.made_from
    assert len(item.keys) == 18 and set(item.keys) <= set(learner.state_dict())
    learn(learner, tasks, 1)  # a group of synthesis has as many images as the batch had
