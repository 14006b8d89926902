"""Generated replay as a setting of other methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Train
from perdure.engine.run_logger import RunLogger
from perdure.errors import UsageError
from perdure.kept.store import FileStore
from perdure.methods.finetune import Finetune, FinetuneOptions
from perdure.methods.lwf import Lwf, LwfOptions
from perdure.networks.joint_diffusion.network import PLANS, Plan
from perdure.streams.task import Stream

pytest.importorskip("diffusers")
OPTIONS = EngineOptions(device="cpu", threads=1, trackers=(), save_seconds=1e9)
GENERATED = {
    "replay": "generated",
    "generator": {"size": "smoke", "steps": 2, "batch_size": 4, "text_width": 8, "tokens": 2},
    "pairs": {"count": 4, "batch": 4, "steps": 2, "previews": 0},
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PLANS, "smoke", Plan((8, 8), 1, 1, 8, 4))
    monkeypatch.setattr("perdure.methods.cgr.generator.LOOKS", 16)


@pytest.mark.parametrize(("kind", "options"), [(Finetune, FinetuneOptions), (Lwf, LwfOptions)])
def test_a_generator_learns_beside_the_method_and_its_pairs_are_kept(
    kind: Any,
    options: Any,
    make_setup: Callable[..., Any],
    make_blocks: Callable[..., Stream],
    tmp_path: Path,
) -> None:
    method = kind(make_setup(options.model_validate(GENERATED), epochs=1))
    stream = make_blocks([(1, 2), (3,)])
    method.store = FileStore(tmp_path / "kept")
    machine = Machine(OPTIONS)
    names = []
    for task in stream.tasks:
        checkpoint = Checkpoint(tmp_path / "resume", machine, OPTIONS.save_seconds)
        engine = Engine(machine, OPTIONS, 1, checkpoint, RunLogger(machine, quiet=True))
        with stream.opened(task):
            method.begin(task)
            phases = method.phases(task)
            names.append([phase.name for phase in phases])
            engine.run(method, phases, task.index, checkpoint.load(method, task.index))
        checkpoint.clear()
    assert names == [["labels", "generator", "train", "pairs"], ["labels", "generator", "train", "pairs", "pairs"]]
    assert method.replayed == 4
    assert {item.files for item in method.kept() if item.files} == set(method.files)
    claimed = {key for item in method.kept() for key in item.keys}
    assert {name for name, _ in method.named_buffers() if name.startswith("generator.")} <= claimed


def test_real_images_say_nothing_of_old_classes_and_pairs_nothing_of_new_ones(
    make_setup: Callable[..., Any], make_blocks: Callable[..., Stream]
) -> None:
    from perdure.data.case import Batch
    from perdure.methods.replay import told

    method = Lwf(make_setup(LwfOptions.model_validate(GENERATED)))
    for task in make_blocks([(1, 2), (3,)]).tasks:
        method.begin(task)
    assert method.learning == (1, 2, 3)
    batch = Batch(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8).long(), ("a", "b"), torch.tensor([0, 1]))
    annotated = told(batch, method.generator).annotated
    assert annotated is not None
    assert annotated[:, 1:4].tolist() == [[False, False, True], [True, True, False]]
    assert told(batch, None) is batch
    assert method._told(told(batch, method.generator), (1, 2, 3)).tolist() == annotated[:, 1:4].tolist()
    terms = method.loss(batch._replace(images=torch.randn(2, 3, 8, 8)))
    assert set(terms) == {"current", "distill"}


def test_without_replay_nothing_is_there(make_setup: Callable[..., Any], make_blocks: Callable[..., Stream]) -> None:
    method = Lwf(make_setup(LwfOptions()))
    task = make_blocks([(1, 2), (3,)]).tasks[0]
    method.begin(task)
    (phase,) = method.phases(task)
    assert isinstance(phase, Train) and phase.module is method
    assert method.generator is None and not method.kept() and method.replayed == 0
    assert not any(name.startswith("generator") for name in method.state_dict())


def test_replay_needs_images(make_setup: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="needs a 2D network for segmentation"):
        Finetune(make_setup(FinetuneOptions.model_validate(GENERATED), dims=3))
