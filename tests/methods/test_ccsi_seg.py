"""Class impressions for segmentation, task after task, on a tiny network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from perdure.data.case import Batch
from perdure.engine.phases import Generate
from perdure.engine.state import restore
from perdure.errors import Interrupted, PerdureError, UsageError
from perdure.files import write_tensors
from perdure.labels import IGNORE
from perdure.methods.ccsi_seg.ccsi_seg import CcsiSeg
from perdure.methods.ccsi_seg.impressions import plan_impressions, synthesis_terms
from perdure.methods.ccsi_seg.statistics import SHOWN, decode
from perdure.methods.losses import class_bce

GROUPS = [(2, 5), (1,), (4, 3)]
QUICK = {"per_class": 3, "batch": 4, "steps": 12, "least_dice": 0.0, "confidence": 0.5}


def method(make_setup, dims=2, training=None, synthesis=None, **options):
    given = CcsiSeg.Options(synthesis=QUICK | (synthesis or {}), patch=8, previews=2, **options)
    return CcsiSeg(make_setup(given, dims=dims, **(training or {})))


@pytest.fixture
def work(run_phase, tmp_path):
    """Run phases of a task, Generate phases too; returns the log by phase."""

    def go(learner, stream, index, phases=None):
        task, log = stream.tasks[index], {}
        with stream.opened(task):
            torch.manual_seed(index)
            learner.begin(task)
            for phase in list(learner.phases(task))[:phases]:
                if isinstance(phase, Generate):
                    learner.eval()
                    paths = [tmp_path / f"{index}-{item}.safetensors" for item in range(phase.count)]
                    for item, path in enumerate(paths):
                        torch.manual_seed(item)
                        write_tensors(path, phase.make(item, None))
                    phase.finish(paths)
                    log[phase.name] = []
                else:
                    log[phase.name] = run_phase(phase)
        return log

    return go


@pytest.fixture
def at_second(make_blocks, make_setup, work, first_batch):
    """A method in the middle of its second task, and a batch of it."""

    def make(**options):
        stream = make_blocks(GROUPS)
        learner = method(make_setup, **options)
        work(learner, stream, 0)
        work(learner, stream, 1, phases=1 if learner.options.replay != "none" else 0)
        task = stream.tasks[1]
        with stream.opened(task):
            batch = first_batch(learner.phases(task)[-2].data())
        return learner.train(), batch

    return make


def test_three_tasks(make_blocks, make_setup, work):
    stream, learner = make_blocks(GROUPS, count=24), method(make_setup)
    for index, new in enumerate(GROUPS):
        before = {name: getattr(learner.memory.statistics, name).clone() for name in SHOWN}
        log = work(learner, stream, index)
        assert list(log) == (["impressions", "train", "statistics"] if index else ["train", "statistics"])
        terms = {"current", "pseudo", "lf", "old", "new"} if index else {"current"}
        assert set(log["train"][0]) == terms
        seen, known = sum(map(len, GROUPS[: index + 1])), learner.memory.statistics
        assert known.patches.shape == (seen, 3, 8, 8) and known.masks.shape == (seen, 1, 8, 8)
        assert known.patches.dtype == known.masks.dtype == known.background.dtype == torch.uint8
        assert known.co_occurrence.shape == (seen, seen) and torch.equal(known.co_occurrence, known.co_occurrence.T)
        assert known.class_moments.shape == (seen, 2, 16) and known.class_moments.flatten(1).any(1).all()
        assert known.size.tolist() == [16, 16]
        for name in SHOWN if index else ():  # appended in learning order; old rows stay
            assert torch.equal(getattr(known, name)[: seen - len(new)], before[name])
        assert learner.memory.images is None and learner.memory.labels is None
        state = learner.state_dict()
        assert all(value.isfinite().all() for value in state.values())
        claimed = {key for item in learner.kept() for key in item.keys}
        assert claimed == {key for key in state if not key.startswith("network.")}
    assert learner.memory.yields.tolist() == [9, 9] and learner.replayed == 9
    assert "of 9 impressions made for this task 9" in learner.kept()[1].made_from
    learner.memory.yields[1] = 2
    assert "which is few" in learner.kept()[1].made_from
    assert learner.memory.previews.shape == (3, 2, 3, 16, 16)
    with torch.no_grad():
        predicted = learner.eval().predict(torch.randn(1, 3, 16, 16))
    assert predicted.class_ids == (0, 2, 5, 1, 4, 3)


def test_impressions_show_what_the_layout_asks_for(at_second):
    quick = {"epochs": 20, "optimizer": "adamw", "lr": 0.03}
    synthesis = {"steps": 60, "per_class": 8, "batch": 16, "jitter": 0.0, "band": 0}
    learner, _ = at_second(training=quick, synthesis=synthesis)
    teacher = learner.memory.teacher
    known, options = learner.memory.statistics, learner.options.synthesis
    low, high = known.ends[:, :, None, None]
    torch.manual_seed(0)
    item = learner.memory.make(0)
    torch.manual_seed(0)
    job = plan_impressions(known, options, len(learner.old), 0)
    images = decode(item["images"], known.ends)
    assert len(images) == int(item["tried"]) == len(job.layouts) == 16
    assert ((images >= low) & (images <= high)).all() and (job.start > high).any()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    before, after = (
        synthesis_terms(teacher, shown.clone(), job, known, options, 0)
        for shown in (job.start.clamp(low, high), images)
    )
    assert set(before) == {"layout", "tv", "l2", "moments", "class_moments"}
    assert float(after["layout"]) < 0.8 * float(before["layout"])
    assert float(after["moments"] + after["class_moments"]) < float(before["moments"] + before["class_moments"])


class Progress:
    """Stops after a number of steps, or goes on from what was saved."""

    def __init__(self, stop_at=None, saved=None):
        self.stop_at, self.saved = stop_at, saved

    def checkpoint(self, done, of, note, state):
        if done == self.stop_at:
            kept = state()
            self.saved = copy.deepcopy(kept)
            raise Interrupted("stopped")


def test_a_stopped_item_ends_with_the_same_pixels(at_second):
    learner, _ = at_second(synthesis={"steps": 25})
    torch.manual_seed(7)
    whole = learner.memory.make(1, Progress())
    torch.manual_seed(7)
    progress = Progress(stop_at=20)
    with pytest.raises(Interrupted):
        learner.memory.make(1, progress)
    torch.manual_seed(99)  # a new process draws other numbers
    again = learner.memory.make(1, Progress(saved=progress.saved))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_restored_in_the_middle_of_training(at_second, make_setup, make_blocks):
    learner, batch = at_second()
    again = method(make_setup)
    stream = make_blocks(GROUPS)
    for task in stream.tasks[:2]:
        again.begin(task)
    restore(again, learner.state_dict())
    again.memory.old_network = learner.memory.old_network
    losses = []
    for each in (learner, again.train()):
        torch.manual_seed(3)
        losses.append({name: float(value.detach()) for name, value in each.later_loss(batch).items()})
    assert losses[0] == losses[1] and losses[0]["old"] > 0


def test_terms_are_settings(at_second):
    learner, batch = at_second(replay="none")
    assert set(learner.later_loss(batch)) == {"current", "pseudo", "lf"} and learner.memory.images is None
    learner, batch = at_second(lambda_margin=1.0, lambda_lf=0.0)
    terms = learner.later_loss(batch)
    assert set(terms) == {"current", "pseudo", "lf", "old", "new", "margin"} and float(terms["lf"].detach()) == 0.0
    assert float(terms["margin"].detach()) > 0


def test_nothing_has_changed_yet(at_second):
    learner, batch = at_second(replay="none")
    learner.network.eval()
    assert float(learner.later_loss(batch)["lf"].detach()) == pytest.approx(0.0, abs=1e-5)


def test_pseudo_labels_stand_for_missing_ones_only(at_second):
    learner, batch = at_second(replay="none", confidence=0.5)
    learner.network.eval()
    teacher = learner.memory.teacher
    with torch.no_grad():
        seen = learner.predict(batch.images[:0]).class_ids
        logits = nn.functional.interpolate(teacher.classify(teacher.features(batch.images)), size=16, mode="bilinear")
    best, channel = logits.max(1)
    guess = torch.where(best > 0, torch.tensor(learner.old)[channel], 0)
    labels = torch.where(batch.labels == 0, guess, batch.labels)
    old = learner.network.classify(learner.network.features(batch.images))[:, : len(learner.old)]
    expected = class_bce(old, labels, learner.old, learner.training_options.pos_weight, False).sum()
    torch.testing.assert_close(learner.later_loss(batch)["pseudo"], expected)
    assert (labels != guess).any() and (labels != batch.labels).any() and seen[0] == 0


def test_new_classes_are_absent_on_old_pixels(at_second):
    labels = torch.tensor([[[2, 0], [IGNORE, 5]]]).repeat_interleave(8, 1).repeat_interleave(8, 2)
    zero, ten = torch.zeros(1, 2, 16, 16), torch.zeros(1, 1, 16, 16)
    ten[:, :, :8, 8:] = 10.0  # the new class is seen where the synthetic background is
    for chosen, expected in [("old_pixels", 0.6931), ("all", (0.6931 * 2 + 10.0) / 3)]:
        learner, _ = at_second(negatives=chosen, lambda_new=1.0)
        assert float(learner._replay_terms(zero, ten, labels)["new"]) == pytest.approx(expected, abs=1e-3)


def test_means_are_replayed_as_drawn(at_second):
    learner, _ = at_second(replay="means", synthesis={"least_dice": 1.0, "band": 0})
    assert learner.memory.yields.tolist() == [6, 6]  # nothing is asked of the teacher
    assert set(learner.memory.labels.unique().tolist()) <= {0, *learner.old}


def test_when_no_impression_shows_its_layout(at_second):
    with pytest.raises(PerdureError, match="in none of 6 impressions"):
        at_second(synthesis={"least_dice": 1.0, "steps": 1})


def test_volumes_are_refused(make_setup):
    with pytest.raises(UsageError, match="not in 3D"):
        method(make_setup, dims=3)


def test_the_images_behind_means_are_those_with_a_region(make_setup, make_blocks):
    learner, (task, *_) = method(make_setup), make_blocks([(1, 2)], count=8).tasks
    learner.begin(task)
    labels = torch.zeros(8, 16, 16, dtype=torch.int64)
    labels[:, :4, :4] = 1
    labels[:, 8, 8] = 2  # a pixel in every image shows no shape
    labels[3, 8:, 8:] = 2
    batch = Batch(torch.randn(8, 3, 16, 16), labels, tuple("abcdefgh"))
    totals = learner.memory.measure(learner.network.eval(), 0.5, batch)
    learner.memory.cases = 8
    learner.memory.finish_measuring(1, totals)
    assert learner.memory.statistics.regions.tolist() == [8, 1]
    assert {item.from_images for item in learner.memory.kept("")} == {1}
    # each image was looked at three times
    three = {name: value * 3 for name, value in totals.items()}
    learner.memory.finish_measuring(3, three)
    assert learner.memory.statistics.regions.tolist() == [8, 1]
