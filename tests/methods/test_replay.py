"""Replay as a setting of other methods: of generated pairs, of class impressions, and of exemplars."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Collect, Train
from perdure.engine.run_logger import RunLogger
from perdure.errors import Interrupted, UsageError
from perdure.kept.store import FileStore
from perdure.methods.finetune import Finetune, FinetuneOptions
from perdure.methods.losses import class_bce
from perdure.methods.lwf import Lwf, LwfOptions
from perdure.methods.past import Nothing, told
from perdure.methods.replay import ReplayOptions
from perdure.methods.star import Star
from perdure.methods.star.star import StarOptions
from perdure.networks.joint_diffusion.network import PLANS, Plan
from perdure.streams.task import Stream

pytest.importorskip("diffusers")
OPTIONS = EngineOptions(device="cpu", threads=1, trackers=(), save_seconds=1e9)
GENERATED = {
    "replay": "generated",
    "generator": {"size": "smoke", "steps": 2, "batch_size": 4, "text_width": 8, "tokens": 2},
    "pairs": {"count": 4, "batch": 4, "steps": 2, "previews": 0},
}
EXEMPLARS = {"replay": "exemplars", "exemplars": {"per_task": 3}}
IMPRESSIONS = {
    "replay": "impressions",
    "impressions": {"per_class": 3, "batch": 4, "steps": 4, "least_dice": 0.0, "patch": 8, "previews": 1},
}
PASTS = pytest.mark.parametrize("past", [GENERATED, IMPRESSIONS, EXEMPLARS], ids=lambda past: past["replay"])
KINDS = [(Finetune, FinetuneOptions), (Lwf, LwfOptions), (Star, StarOptions)]


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "smoke", Plan((8, 8), 1, 1, 8, 4))
    monkeypatch.setattr("perdure.methods.past.LOOKS", 16)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    """Begin a task and run its phases in ``folder`` with the real engine, all or the first few; returns the method.

    With ``stop_at`` the run is stopped at that step of some phase, and goes on as a new process would.
    """

    def go(
        method: Any,
        stream: Stream,
        index: int,
        phases: int | None = None,
        folder: str = "run",
        stop_at: int | None = None,
    ) -> Any:
        method.store = FileStore(tmp_path / folder / "kept", tmp_path / folder / "journal")
        machine, task = Machine(OPTIONS), stream.tasks[index]
        checkpoint = Checkpoint(tmp_path / folder / "resume", machine, OPTIONS.save_seconds)
        engine = Engine(machine, OPTIONS, 1, checkpoint, RunLogger(machine, quiet=True))
        with stream.opened(task):
            torch.manual_seed(index)
            method.begin(task)
            if stop_at is not None:
                before, due = copy.deepcopy(method), checkpoint.due
                checkpoint.due = lambda now, _: (now == stop_at, now == stop_at)  # type: ignore[method-assign]
                with pytest.raises(Interrupted):
                    engine.run(method, method.phases(task), index, checkpoint.load(method, index))
                method, checkpoint.due = before, due  # type: ignore[method-assign]
            engine.run(method, list(method.phases(task))[:phases], index, checkpoint.load(method, index))
        checkpoint.clear()
        return method

    return go


@pytest.fixture
def make(make_setup: Callable[..., Any]) -> Callable[..., Any]:
    """A method with replay, tiny and of one epoch."""

    def go(kind: Any, options: Any, past: dict[str, Any] = GENERATED, **given: Any) -> Any:
        torch.manual_seed(3)
        return kind(make_setup(options.model_validate(past), epochs=1, **given))

    return go


@PASTS
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_the_past_is_made_beside_the_method_and_kept(
    kind: Any,
    options: Any,
    past: dict[str, Any],
    make: Callable[..., Any],
    make_blocks: Callable[..., Stream],
    run: Callable[..., Any],
) -> None:
    method, stream, names = make(kind, options, past), make_blocks([(1, 2), (3,)]), []
    for index, task in enumerate(stream.tasks):
        run(method, stream, index)
        with stream.opened(task):
            names.append([phase.name for phase in method.phases(task)])
    before, after = {
        "generated": ((["labels", "generator"],) * 2, (["pairs"], ["pairs"] * 2)),
        "impressions": (([], ["impressions"]), (["statistics"],) * 2),
        "exemplars": ((["exemplars"],) * 2, ([], [])),
    }[past["replay"]]
    around = (["counts"], ["prototypes", "spreads"]) if kind is Star else ([], [])
    assert names == [[*around[0], *before[k], "train", *after[k], *around[1]] for k in (0, 1)]
    assert method.replayed == {"generated": 4, "impressions": 6, "exemplars": 3}[past["replay"]]
    assert {item.files for item in method.kept() if item.files} == set(method.files)
    kinds = {item.kind for item in method.kept() if item.files}
    assert kinds == {"generated": {"synthetic"}, "impressions": set(), "exemplars": {"exemplars"}}[past["replay"]]
    assert method.averages_images == (past is IMPRESSIONS)
    # six images in each task, however many samples were looked at
    assert {item.from_images for item in method.kept() if item.from_images is not None} <= {6}
    assert past is not IMPRESSIONS or any(item.from_images == 6 for item in method.kept())
    claimed = {key for item in method.kept() for key in item.keys}
    # gone when their task is done, or written with the next one
    passing = {"replay_amounts", "repeat_factor", "past.memory.images", "past.memory.labels"}
    weights = {name for name, _ in method.named_buffers() if name.startswith("network.")}
    assert {name for name, _ in method.named_buffers()} - weights - passing == claimed


@PASTS
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_a_stopped_task_ends_with_the_same_bytes(
    kind: Any,
    options: Any,
    past: dict[str, Any],
    make: Callable[..., Any],
    make_blocks: Callable[..., Stream],
    run: Callable[..., Any],
) -> None:
    stream, ends = make_blocks([(1, 2), (3,)]), []
    for folder, stop_at in (("whole", None), ("stopped", 2)):
        method = make(kind, options, past)
        run(method, stream, 0, folder=folder)
        ends.append(run(method, stream, 1, folder=folder, stop_at=stop_at))
    whole, stopped = ends
    assert whole.files == stopped.files
    states = whole.state_dict(), stopped.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert past is not IMPRESSIONS or "past.memory.images" not in states[0]
    for names in whole.files.values():
        for one, two in zip(whole.store.paths(names), stopped.store.paths(names), strict=True):
            assert one.read_bytes() == two.read_bytes()


@PASTS
def test_real_images_say_nothing_of_old_classes_and_replayed_ones_nothing_of_new_ones(
    past: dict[str, Any], make: Callable[..., Any], make_blocks: Callable[..., Stream]
) -> None:
    method = make(Lwf, LwfOptions, past)
    for task in make_blocks([(1, 2), (3,)]).tasks:
        method.begin(task)
    assert method.learning == (1, 2, 3)
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8).long(), ("a", "b"), torch.tensor([0, 1]))
    annotated = told(batch, method.past).annotated
    assert annotated is not None
    assert annotated[:, 1:4].tolist() == [[False, False, True], [True, True, False]]
    assert told(batch, Nothing()) is batch
    assert method._told(told(batch, method.past), (1, 2, 3)).tolist() == annotated[:, 1:4].tolist()
    terms = method.loss(batch._replace(images=torch.randn(2, 3, 8, 8)))
    assert set(terms) == {"current", "distill"}


@pytest.fixture
def star(make: Callable[..., Any], make_blocks: Callable[..., Stream], run: Callable[..., Any]) -> tuple[Star, Stream]:
    """STAR with pairs where its second task begins to train, and the stream."""
    method, stream = make(Star, StarOptions), make_blocks([(1, 2), (3,)])
    run(method, stream, 0)
    return run(method, stream, 1, phases=1).train(), stream


def _two_and_two() -> Batch:
    """Two images of the second task and two pairs of the first one."""
    torch.manual_seed(7)
    labels = torch.zeros(4, 16, 16).long()
    labels[0, :8], labels[1, 4:], labels[2, :8], labels[3, 8:] = 3, 3, 1, 2
    return Batch(torch.randn(4, 3, 16, 16), labels, tuple("abcd"), torch.tensor([0, 0, 1, 1]))


def test_the_terms_of_star_are_those_of_the_real_images(star: tuple[Star, Stream]) -> None:
    method, batch = star[0], _two_and_two()
    images = torch.cat([batch.images[:2], torch.randn(2, 3, 16, 16)])
    other = batch._replace(images=images, labels=batch.labels.clamp(max=3).flip(1)).where(batch.parts == 1)
    found = []
    for pairs in (batch.of(1), other):
        joined = (torch.cat([one, two]) for one, two in zip(batch.of(0)[:2], pairs[:2], strict=True))
        torch.manual_seed(4)
        terms = method.later_loss(Batch(*joined, batch.names, batch.parts))
        found.append({name: float(value.detach()) for name, value in terms.items()})
    assert set(found[0]) == {"current", "replay", "background", "ocfm", "sad", "past"}
    assert found[0].pop("past") != pytest.approx(found[1].pop("past"))
    assert found[0] == pytest.approx(found[1])
    assert method.network.training and found[0]["replay"] > 0


def test_pairs_teach_star_the_features_of_old_classes(star: tuple[Star, Stream]) -> None:
    method, batch = star[0], _two_and_two()
    pairs = method.later_loss(batch)["past"]
    pairs.backward()
    # old classifiers are frozen, the newest one is not asked
    assert all(p.grad is None or not p.grad.any() for p in method.network.classifiers.parameters())
    assert sum(float(p.grad.abs().sum()) for p in method.network.body.parameters() if p.grad is not None) > 0
    logits = method.network.classify(method.network.features(batch.images)[2:], channels=[0, 1])
    expected = class_bce(logits, batch.labels[2:], (1, 2), method.training_options.pos_weight).sum()
    torch.testing.assert_close(pairs.detach(), expected.detach())


def test_the_statistics_of_star_are_of_real_images(star: tuple[Star, Stream], run: Callable[..., Any]) -> None:
    method, stream = star
    task = stream.tasks[1]
    with stream.opened(task):
        phases = list(method.phases(task))
        collected = {p.name: p.data() for p in phases if isinstance(p, Collect) and p.name != "labels"}
        (trained,) = [p.data() for p in phases if isinstance(p, Train) and p.name == "train"]
        assert list(collected) == ["counts", "prototypes", "spreads"]
        assert all(isinstance(data, Batches) and len(data.samples) == 6 for data in collected.values())
    assert isinstance(trained, Mix) and [part.size for part in trained.parts] == [1, 1]


def test_prototypes_are_divided_among_the_steps_of_a_mixed_epoch(
    make: Callable[..., Any], make_blocks: Callable[..., Stream], run: Callable[..., Any]
) -> None:
    method, stream = make(Star, StarOptions), make_blocks([(1, 2), (3,)])
    run(method, stream, 0)
    alone = copy.deepcopy(method)
    del alone.past  # torch refuses another object in the place of a module
    alone.past = Nothing()
    counted = [run(one, stream, 1, phases=1) for one in (method, alone)]
    mixed, plain = (one.replay_amounts for one in counted)
    assert plain.sum() > 0
    # twice as many steps, with half as many real images in each
    torch.testing.assert_close(2 * mixed, plain)
    assert torch.equal(counted[0].counts, counted[1].counts)


def test_without_replay_nothing_is_there(make_setup: Callable[..., Any], make_blocks: Callable[..., Stream]) -> None:
    method = Lwf(make_setup(LwfOptions()))
    task = make_blocks([(1, 2), (3,)]).tasks[0]
    method.begin(task)
    (phase,) = method.phases(task)
    assert isinstance(phase, Train) and phase.module is method
    assert not method.kept() and method.replayed == 0
    assert all(name.startswith("network.") for name in method.state_dict())


def test_settings_of_another_kind_of_replay_are_told() -> None:
    given = {"replay": "exemplars", "exemplars": {"per_task": 3}, "pairs": {"count": 7}, "generator": {}}
    told = ["method.pairs is set, but not used: method.replay is exemplars, not generated"]
    assert ReplayOptions.model_validate(given).unused() == told
    assert not ReplayOptions.model_validate(given | {"pairs": {"count": 3000}}).unused()


@pytest.mark.parametrize("past", [GENERATED, IMPRESSIONS], ids=lambda past: past["replay"])
def test_made_images_need_a_network_for_images(past: dict[str, Any], make_setup: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=f"replay={past['replay']} makes .* needs a 2D network for segmentation"):
        Finetune(make_setup(FinetuneOptions.model_validate(past), dims=3))


def test_impressions_are_of_old_classes_as_the_old_network_sees_them(
    make: Callable[..., Any], make_blocks: Callable[..., Stream], run: Callable[..., Any]
) -> None:
    method, stream = make(Lwf, LwfOptions, IMPRESSIONS), make_blocks([(1, 2), (3,)])
    run(method, stream, 0)
    before = copy.deepcopy(method.network).eval()
    run(method, stream, 1, phases=1)
    (source,) = method.past.samples(method, stream.tasks[1])
    assert len(source) == 6 and method.past.taught == ((1, 2), (3,))
    low, high = method.past.memory.statistics.ends[:, :, None, None]
    for place in range(6):
        case = source[place]
        assert ((case.image >= low) & (case.image <= high)).all()
        with torch.no_grad():
            scores = F.interpolate(before.classify(before.features(case.image[None])), 16, mode="bilinear")[0]
        best, channel = scores.max(0)
        assert torch.equal(case.label.long(), torch.where(best > 0, torch.tensor([1, 2])[channel], 0))


@PASTS
def test_classes_that_come_again_are_replayed_too(
    past: dict[str, Any], make: Callable[..., Any], make_blocks: Callable[..., Stream], run: Callable[..., Any]
) -> None:
    stream = make_blocks([(1, 2), (1, 3), (2,)])
    for kind, options in KINDS[:2]:
        method = make(kind, options, past)
        for index in range(3):
            run(method, stream, index, folder=kind.__name__)
            assert all(value.isfinite().all() for value in method.state_dict().values())
        assert method.class_ids == (1, 2, 3) and method.replayed > 0
        assert method.past.taught[-1] == (2,)
