"""CGR as a method: its phases, what it keeps, and that the past is what an earlier stage made."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.data.case import Batch
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Collect, Generate, Train
from perdure.engine.run_logger import RunLogger
from perdure.errors import DataError, Interrupted, PerdureError, UsageError
from perdure.files import read_tensors, write_tensors
from perdure.kept.store import FileStore
from perdure.labels import IGNORE
from perdure.methods.cgr.cgr import Cgr
from perdure.methods.cgr.codecs import encode_image, from_bytes, to_bytes
from perdure.methods.cgr.generator import PairGenerator
from perdure.methods.cgr.options import CgrOptions
from perdure.methods.cgr.pairs import read_manifest
from perdure.methods.cgr.prompts import Card
from perdure.methods.cgr.terms import standardised
from perdure.networks.joint_diffusion.network import PLANS, Plan
from perdure.streams.task import Stream, Task

pytest.importorskip("diffusers")
GENERATOR = {"size": "smoke", "steps": 2, "batch_size": 4, "text_width": 8, "tokens": 2}
PAIRS = {"count": 5, "batch": 3, "steps": 2, "previews": 2}
OPTIONS = EngineOptions(device="cpu", threads=1, trackers=(), save_seconds=1e9)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net of a few thousand weights, and statistics of a few looks."""
    monkeypatch.setitem(PLANS, "smoke", Plan((8, 8), 1, 1, 8, 4))
    monkeypatch.setattr("perdure.methods.past.LOOKS", 16)


@pytest.fixture
def make_cgr(make_setup: Callable[..., Any]) -> Callable[..., Cgr]:
    """A tiny CGR; keyword arguments are options, ``generator`` and ``pairs`` parts of theirs."""

    def make(generator: dict[str, Any] | None = None, pairs: dict[str, Any] | None = None, **more: Any) -> Cgr:
        given = {"generator": {**GENERATOR, **(generator or {})}, "pairs": {**PAIRS, **(pairs or {})}, **more}
        torch.manual_seed(3)
        return Cgr(make_setup(CgrOptions.model_validate(given), epochs=1))

    return make


@pytest.fixture
def stream(make_blocks: Callable[..., Stream]) -> Stream:
    return make_blocks([(1, 2), (3,), (4,)], count=6)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Run one task through the real engine in ``folder``."""

    def go(
        method: Cgr, stream: Stream, index: int, folder: str = "run", stop: Callable[..., Any] | None = None
    ) -> None:
        method.store = FileStore(tmp_path / folder / "kept")
        machine = Machine(OPTIONS)
        checkpoint = Checkpoint(tmp_path / folder / "resume", machine, OPTIONS.save_seconds)
        if stop is not None:
            checkpoint.due = stop  # type: ignore[method-assign]
        engine = Engine(machine, OPTIONS, 1, checkpoint, RunLogger(machine, quiet=True))
        task = stream.tasks[index]
        with stream.opened(task):
            torch.manual_seed(index)
            method.begin(task)
            position = checkpoint.load(method, index)
            engine.run(method, method.phases(task), index, position)
        checkpoint.clear()

    return go


def test_phases_of_a_later_task(make_cgr: Callable[..., Cgr], stream: Stream) -> None:
    method = make_cgr()
    names = []
    for task in stream.tasks[:2]:
        method.begin(task)
        with stream.opened(task):
            phases = list(method.phases(task))
        names.append([phase.name for phase in phases])
    assert names == [
        ["labels", "generator", "train", "pairs"],
        ["labels", "generator", "train", "pairs", "pairs"],
    ]
    assert [type(phase) for phase in phases] == [Collect, Train, Train, Generate, Generate]
    counts = [sum(p.numel() for p in c.parameters()) for c in method.network.classifiers]
    assert counts == [3 * 9, 1 * 9]  # background and two classes, then one


def test_each_stage_trains_on_pairs_of_the_one_before(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None]
) -> None:
    method, made = make_cgr(), []
    for index in range(3):
        run(method, stream, index)
        made.append(dict(method.files))
        assert method.replayed == 5 * index
    assert [sorted(names) for names in made] == [
        ["pairs-00-00"],
        ["pairs-01-00", "pairs-01-01"],
        ["pairs-02-00", "pairs-02-01", "pairs-02-02"],
    ]
    hashes = set()
    for files in made:
        for names in files.values():
            for number, path in enumerate(method.store.paths(names)):
                manifest, content = read_manifest(path), read_tensors(path, ["images", "labels"])
                assert content["images"].shape == (3 - number, 3, 16, 16) and content["images"].dtype == torch.uint8
                classes = len(method.generator.cards[manifest.task].ids)
                assert int(content["labels"].max()) <= classes
                assert torch.equal(
                    manifest.histogram, torch.bincount(content["labels"].flatten().long(), minlength=classes + 1)
                )
                assert (manifest.file, manifest.tried) == (number, 3 - number)
                assert torch.equal(manifest.generator, method.generator.stock.digests[manifest.stage])
                hashes.add(bytes(manifest.generator.tolist()))
    assert len(hashes) == 3  # a generator per stage, and earlier files stay as they were
    assert method.generator.stock.previews is not None
    assert method.generator.stock.previews.shape == (4, 2, 3, 16, 32)
    assert method.generator.stock.yields[:, 0].tolist() == [5, 5, 5]
    items = {item.name: item for item in method.kept()}
    assert {item.files for item in items.values() if item.files} == set(method.files)
    claimed = {key for item in items.values() for key in item.keys}
    assert {f"generator.{name}" for name, _ in method.generator.named_buffers()} <= claimed


def test_first_pairs_are_kept_for_good(make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None]) -> None:
    method = make_cgr(pairs={"source": "first"})
    for index in range(3):
        run(method, stream, index)
    assert sorted(method.files) == ["pairs-00-00", "pairs-01-01", "pairs-02-02"]
    assert method.generator.stock.yields[:, 0].tolist() == [5, 5, 5]


def test_pairs_that_nobody_may_read(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None], tmp_path: Path
) -> None:
    method = make_cgr()
    run(method, stream, 0)
    path = method.store.paths(method.files["pairs-00-00"])[0]
    content = read_tensors(path)
    write_tensors(path, content | {"manifest.generator": content["manifest.generator"].flip(0)})
    other = copy.deepcopy(method)
    with pytest.raises(DataError, match="made by another generator"):
        run(other, stream, 1)
    write_tensors(path, content | {"manifest.stage": torch.tensor(1)})
    with pytest.raises(DataError, match="made by the generator of task 2"):
        run(method, stream, 1)


def test_a_stopped_task_ends_with_the_same_weights_and_files(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None], tmp_path: Path
) -> None:
    begun = make_cgr(pairs={"sampler": "dpm", "steps": 3, "labels": "seen"}, distill=1.0)
    run(begun, stream, 0, "whole")
    # `due` is asked after each step of training and each file, and inside of a file after each step but the last
    stops = {"generator": 3, "inside a file": 7, "after a file": 8, "later pairs": 13}
    for name in stops:
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    stopped = {name: copy.deepcopy(begun) for name in stops}
    resumed = {name: copy.deepcopy(begun) for name in stops}
    run(begun, stream, 1, "whole")
    for name, at in stops.items():
        asked = itertools.count(1)

        def due(done: int, stopping: bool, asked: Iterator[int] = asked, at: int = at) -> tuple[bool, bool]:
            now = next(asked) == at
            return now, now

        with pytest.raises(Interrupted):
            run(stopped[name], stream, 1, name, due)
        run(resumed[name], stream, 1, name)
        assert resumed[name].files == begun.files
        state = resumed[name].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in begun.state_dict().items())
        for files in begun.files.values():
            for one, two in zip(begun.store.paths(files), resumed[name].store.paths(files), strict=True):
                assert one.read_bytes() == two.read_bytes()


def drawn_times(
    method: Cgr, stream: Stream, index: int, read: Callable[..., Any], run_phase: Callable[..., Any]
) -> list[list[int]]:
    """Noise levels of two steps of the generator's training."""
    seen: list[list[int]] = []
    hook = method.generator.network.register_forward_pre_hook(lambda _, given: seen.append(given[1].tolist()))
    task = stream.tasks[index]
    with stream.opened(task):
        labels, phase = method.generator.learn(method, task)
        run_phase(labels)
        assert isinstance(phase, Train) and phase.data is not None
        phase.optimizer()
        for step, batch in zip(range(2), read(phase.data()), strict=False):
            torch.manual_seed(step)
            phase.loss(batch)
            assert phase.after_step is not None
            phase.after_step(step)
    hook.remove()
    return seen


def test_noise_levels_are_new_at_every_step_of_every_stage(
    make_cgr: Callable[..., Cgr],
    stream: Stream,
    run: Callable[..., None],
    read: Callable[..., Any],
    run_phase: Callable[..., Any],
) -> None:
    """Q8: published, those of later stages are the last ones of the first."""
    method = make_cgr(generator={"batch_size": 2})
    fixed = make_cgr(generator={"batch_size": 2}, compat=["frozen_timesteps"])
    for one in (method, fixed):
        run(one, stream, 0)
        one.begin(stream.tasks[1])
    first, second = drawn_times(method, stream, 1, read, run_phase)
    assert first != second and len(first) == 4
    assert first[:2] == first[2:]  # both passes of a step
    first, second = drawn_times(fixed, stream, 1, read, run_phase)
    assert first == second


def test_adapters_learn_and_only_from_their_own_task(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None]
) -> None:
    """Q9: published, they stay as they are drawn. Gradients come late: all outputs of a fresh network are zero."""
    method = make_cgr(generator={"steps": 6, "lr": 0.05, "adapter_eps": 1e-20})
    fresh = make_cgr()
    fresh.begin(stream.tasks[0])
    before = {k: v.clone() for k, v in fresh.generator.network.adapters.state_dict().items()}
    torch.manual_seed(0)
    run(method, stream, 0)
    assert (method.generator.network.adapters[0].gamma - 1e-4).abs().max() > 1e-4
    frozen = make_cgr(generator={"steps": 4, "lr": 0.05}, compat=["frozen_adapters"])
    run(frozen, stream, 0)
    after = frozen.generator.network.adapters.state_dict()
    assert before.keys() == after.keys() and torch.equal(after["0.gamma"], torch.full((8,), 1e-4))
    past = make_cgr(generator={"freeze_past_adapters": True})
    for index in range(2):
        past.begin(stream.tasks[index])
    assert [next(a.parameters()).requires_grad for a in past.generator.network.adapters] == [False, True]
    without = make_cgr(generator={"adapters": False})
    run(without, stream, 0)
    assert not len(without.generator.network.adapters)


def test_prompts_of_real_and_replayed_pairs_are_made_in_one_place(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None], read: Callable[..., Any]
) -> None:
    method, published = make_cgr(), make_cgr(compat=["full_prompts"])
    for one in (method, published):
        run(one, stream, 0)
        one.begin(stream.tasks[1])
    task = stream.tasks[1]
    for one in (method, published):
        with stream.opened(task):
            phase = one.generator.learn(one, task)[1]
            assert isinstance(phase, Train) and phase.data is not None
            batch = next(iter(read(phase.data())))
        pairs, places, tasks = one.generator._encoded(batch)
        assert pairs.shape[1:] == (4, 16, 16) and float(pairs.abs().max()) <= 1
        assert set(tasks.tolist()) <= {0, 1}
        real = places[tasks == 1]
        assert set(real.tolist()) == {5 + 1}  # the rows of task 1 come after 2² + 1 of the first; every image shows 3
        replayed = places[tasks == 0]
        if one is published:
            assert set(replayed.tolist()) <= {4}
        else:
            assert set(replayed.tolist()) <= {1, 2, 3}


def test_settings_that_do_not_fit(make_cgr: Callable[..., Cgr], stream: Stream, make_setup: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="needs the folder of a text encoder"):
        make_cgr(generator={"text": "clip"})
    with pytest.raises(UsageError, match="not in 3D"):
        Cgr(make_setup(CgrOptions(), dims=3))


def test_a_task_without_any_mask(make_cgr: Callable[..., Cgr], stream: Stream) -> None:
    method = make_cgr()
    task = Task(0, "x", (1,), (), frozenset((1,)))
    method.begin(task)
    sums = {"subsets": torch.tensor([4, 0, 0]), "areas": torch.zeros(1, 64)}
    with pytest.raises(PerdureError, match="no training image shows a class"):
        method.generator.known.keep(sums, grey=True)


def test_a_gate_that_nothing_passes(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "perdure.methods.cgr.generator.sound", lambda codes, areas: torch.zeros(len(codes), dtype=torch.bool)
    )
    method = make_cgr(pairs={"gate": True})
    # while the first task's data is open, not when the second one finds nothing to replay
    with pytest.raises(PerdureError, match="none of 5 pairs generated for task '1\\+2' was fit to be stored: 0 passed"):
        run(method, stream, 0)


def test_pairs_whose_mask_does_not_fit_are_left_out(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pair of each file fits with a Dice of 0.8, the others with 0.4: the fit of all of them is told."""

    def found(codes: torch.Tensor, seen: torch.Tensor, classes: int) -> torch.Tensor:
        return torch.tensor([0.8] + [0.4] * (len(codes) - 1))

    monkeypatch.setattr("perdure.methods.cgr.generator.agreement", found)
    method = make_cgr(pairs={"least_fit": 0.5})
    run(method, stream, 0)
    stored = [read_tensors(path)["images"] for path in method.store.paths(method.files["pairs-00-00"])]
    assert [len(images) for images in stored] == [1, 1]
    assert method.generator.stock.yields[0].tolist()[::2] == [5, 2]
    assert float(method.generator.stock.fits[0]) == pytest.approx((2 * 0.8 + 3 * 0.4) / 5)
    run(method, stream, 1)  # the two are enough to go on with
    with pytest.raises(PerdureError, match="none of 5 pairs generated for task '1\\+2' was fit to be stored"):
        run(make_cgr(pairs={"least_fit": 0.9}), stream, 0)


def test_masks_of_pairs_are_what_the_segmenter_sees(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bright(images: torch.Tensor) -> torch.Tensor:  # ids 1 and 2 are the local codes
        return 1 + (images.mean(1) > 0).long()

    monkeypatch.setattr(Cgr, "_labels", lambda self, images: bright(images))
    generated, seen = make_cgr(), make_cgr(pairs={"labels": "seen"})
    for method, folder in ((generated, "generated"), (seen, "seen")):
        run(method, stream, 0, folder)
    assert torch.equal(generated.generator.stock.fits, seen.generator.stock.fits)  # of the generated masks
    assert float(seen.generator.stock.fits[0]) < 1
    for one, two in zip(*(m.store.paths(m.files["pairs-00-00"]) for m in (generated, seen)), strict=True):
        published, content = read_tensors(one), read_tensors(two)
        assert torch.equal(published["images"], content["images"])
        labels = bright(from_bytes(content["images"], seen.generator.cards[0].ends))
        assert torch.equal(content["labels"].long(), labels) and not torch.equal(published["labels"].long(), labels)
        assert torch.equal(read_manifest(two).histogram, torch.bincount(labels.flatten(), minlength=3))
    run(seen, stream, 1, "seen")


def test_distance_from_the_segmenter_of_before(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None]
) -> None:
    """By hand: a real image counts where nothing is labelled, a pair everywhere, and new classes are background."""
    method = make_cgr(distill=2.0, rotate=0.0)
    run(method, stream, 0)
    before = copy.deepcopy(method.network).eval()
    method.begin(stream.tasks[1])
    torch.manual_seed(0)
    labels = torch.zeros(2, 16, 16, dtype=torch.int64)
    labels[0, :4], labels[0, 4], labels[1, :4] = 3, IGNORE, 1
    batch = Batch(torch.randn(2, 3, 16, 16), labels, ("real", "pair"), torch.tensor([0, 1]))
    method.network.eval()
    terms = method.loss(batch)
    images = standardised(batch.images)
    with torch.no_grad():
        logits, old = method.network.full_logits(images), before.full_logits(images).softmax(1)
        p = logits.softmax(1)
        given = torch.cat([p[:, :1] + p[:, 3:], p[:, 1:3]], 1)
        each = -(old * given.log()).sum(1)
        expected = torch.cat([each[0, 5:].flatten(), each[1].flatten()]).mean()
    torch.testing.assert_close(terms["distill"], 2.0 * expected)
    assert terms["dice"].requires_grad and terms["distill"].requires_grad
    assert not any(p.requires_grad for p in method.old_network.module.parameters())  # type: ignore[union-attr]
    assert "distill" not in make_begun(make_cgr(), stream).loss(batch)
    assert not any(key.startswith("old_network") for key in method.state_dict())


def test_what_the_labels_tell_is_not_distilled(
    make_cgr: Callable[..., Cgr], make_blocks: Callable[..., Stream], run: Callable[..., None]
) -> None:
    """A class that comes back: on real images its labels stand alone, whatever the old segmenter sees."""
    stream = make_blocks([(1, 2), (2,)], count=6)
    method = make_cgr(distill=1.0, rotate=0.0)
    run(method, stream, 0)
    method.begin(stream.tasks[1])
    method.network.eval()
    images, labels = torch.randn(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.int64)
    with torch.no_grad():
        real = method.loss(Batch(images, labels, ("a",), torch.tensor([0])))["distill"]
        pair = method.loss(Batch(images, labels, ("a",), torch.tensor([1])))["distill"]
        p = method.network.full_logits(standardised(images)).softmax(1)
    joined = torch.stack([p[:, 0] + p[:, 2], p[:, 1]], 1)
    torch.testing.assert_close(real, -(joined * joined.log()).sum(1).mean())  # the network is still as it was
    torch.testing.assert_close(pair, -(p * p.log()).sum(1).mean())


def make_begun(method: Cgr, stream: Stream) -> Cgr:
    """A method that has begun two tasks and trained on none."""
    for task in stream.tasks[:2]:
        method.begin(task)
    return method


def test_the_learning_rate_is_constant_or_falls(make_cgr: Callable[..., Cgr], stream: Stream) -> None:
    for schedule, factors in (("constant", [1, 1, 1]), ("cosine", [1, 0.5, 0])):
        method = make_cgr(generator={"schedule": schedule})
        method.begin(stream.tasks[0])
        with stream.opened(stream.tasks[0]):
            phase = method.generator.learn(method, stream.tasks[0])[1]
        assert isinstance(phase, Train)
        assert [phase.schedule(step, 100) for step in (0, 50, 100)] == pytest.approx(factors)


def test_copies_of_real_images_are_not_stored(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of the made images are replaced by real ones, one of them mirrored."""
    task, planted = stream.tasks[0], []
    with stream.opened(task):
        for position, axis in ((1, None), (4, 2)):
            real = to_bytes(encode_image(task.train()[position].image[None], ((-1,) * 3, (1,) * 3)))[0]
            planted.append(real if axis is None else real.flip(axis))
    own = PairGenerator._decoded

    def decoded(self: PairGenerator, made: torch.Tensor, one: Card) -> tuple[torch.Tensor, torch.Tensor]:
        images, codes = own(self, made, one)
        if len(images) == 3:  # the first file
            images[1:] = torch.stack(planted)
        return images, codes

    monkeypatch.setattr(PairGenerator, "_decoded", decoded)
    method = make_cgr()
    run(method, stream, 0)
    stored = [read_tensors(path)["images"] for path in method.store.paths(method.files["pairs-00-00"])]
    assert [len(images) for images in stored] == [1, 2]
    assert not any(torch.equal(image, copy) for images in stored for image in images for copy in planted)
    assert method.generator.stock.nearness[0, 0] == 2
    told = next(item.made_from for item in method.kept() if item.name == "pairs-1+2")
    assert 0 <= float(method.generator.stock.fits[0]) <= 1 and "have a Dice of" in told
    assert "2 were left out as copies of real images" in told and "5 made" in told and "3 were stored" in told
    unchecked = make_cgr(pairs={"check_copies": False})
    run(unchecked, stream, 0)
    assert int(unchecked.generator.stock.yields[0, 2]) == 5


def test_predictions_compare_all_classes_and_background(
    make_cgr: Callable[..., Cgr], stream: Stream, run: Callable[..., None]
) -> None:
    method = make_cgr()
    for index in range(2):
        run(method, stream, index)
    prediction = method.eval().predict(torch.randn(2, 3, 16, 16))
    assert prediction.class_ids == (0, 1, 2, 3)
    assert torch.allclose(prediction.scores().sum(1), torch.ones(2, 16, 16), atol=1e-5)
