"""Every method on every network it claims, through the real engine: learns, resumes, predicts, keeps what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from perdure.config.build import method_class
from perdure.data.preparation import Preparation
from perdure.data.source import Source
from perdure.engine.checkpoint import Checkpoint
from perdure.engine.engine import Engine
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.run_logger import RunLogger
from perdure.errors import Interrupted
from perdure.kept.ledger import read_ledger, task_folder, write_ledger
from perdure.kept.method_state import read_files, read_kept, write_kept
from perdure.kept.store import FileStore
from perdure.labels import label_space
from perdure.methods import METHODS
from perdure.methods.options import Setup, TrainingOptions
from perdure.metrics.confusion import ConfusionMatrix, confusion
from perdure.metrics.measured import class_values
from perdure.networks.build import NETWORKS as BUILT
from perdure.networks.build import build_network
from perdure.seeds import derive_seed, seeded
from perdure.streams.class_incremental import class_incremental
from perdure.streams.task import Stream, merged

pytestmark = pytest.mark.contract
TINY = {"backbone": "tiny_resnet", "tiny_channels": [8, 8, 8, 16], "output_stride": 4, "width": 16}
NETWORKS = {
    "deeplab-2d": (2, 16, "deeplab", TINY),
    "unet-2d": (2, 16, "residual_unet", {"widths": [8, 16], "norm": "group"}),
    "unet-3d": (3, 8, "residual_unet", {"widths": [8, 16], "norm": "group"}),
    "cosine": (2, 32, "cosine_resnet", {"size": "small"}),
    "clip": (
        2,
        16,
        "clip_segmenter",
        {"encoder": "tiny_resnet", "stride": 4, "dim": 32, "layers": 1, "heads": 4, "dropout": 0},
    ),
}


def _fits(method: str, network: tuple) -> bool:
    """Whether a method claims the kind and the dimensions of a network; of queries by name there is one method."""
    if (method == "clip_ciss") != (network[2] == "clip_segmenter"):
        return False  # other methods train classifiers on its encoder: test_clip_ciss.py
    kind = method_class(method)
    return BUILT[network[2]].kind in kind.kinds and network[0] in getattr(kind, "dims", (2, 3))


FITTING = [(m, n) for m in METHODS for n, built in NETWORKS.items() if _fits(m, built)]
SYNTHESIS = {"warmup": 10, "group_size": 20, "groups_at_once": 2}
GENERATOR = {"size": "smoke", "batch_size": 8, "lr": 0.002, "text_width": 8, "tokens": 2, "adapter_eps": 1e-15}
QUICK = {
    "ccsi": {"per_class": 20, "synthesis": SYNTHESIS | {"steps": 60}},
    "cgr": {
        "generator": GENERATOR | {"steps": 4},
        "pairs": {"count": 8, "batch": 8, "sampler": "dpm", "steps": 4},
        "rotate": 0.0,
    },
}
BRIEF = {  # too short to learn
    "ccsi": {"per_class": 20, "synthesis": SYNTHESIS | {"steps": 12}},
    "ccsi_seg": {"synthesis": {"steps": 10, "least_dice": 0}},
    "cgr": {"generator": GENERATOR | {"steps": 4}, "pairs": {"count": 3, "batch": 2, "steps": 2}},
}
SETTINGS = {"epochs": 20, "batch_size": 4, "optimizer": "adamw", "lr": 0.01}
OWN_SETTINGS = {
    "clip_ciss": {"epochs": 60, "lr": 0.002, "later_lr": 0.0007, "clip": 35}
}  # attention needs more and smaller steps
RATES = {"later_lr": 0.003, "neck_lr": 1, "classifier_lr": 1, "new_classifier_lr": 10}
OPTIONS = EngineOptions(device="cpu", threads=1, trackers=(), save_seconds=1e9)


@dataclass(frozen=True)
class Bars(Source):
    """Image i holds a bar of each of two of four classes; a class shows by its colour."""

    dims: int
    side: int = 16
    name = "bars"
    kind = "segmentation"
    patients = False
    other_label = 0
    space = label_space(["a", "b", "c", "d"])

    def names(self, split: str) -> list[str]:
        return [f"{split}{i}" for i in range(24)]

    def mask(self, split: str, name: str) -> np.ndarray:
        number = int(name.removeprefix(split))
        mask = np.zeros((self.side,) * self.dims, np.uint8)
        half = self.side // 2
        mask[..., 1 : half - 1] = 1 + number % 4
        mask[..., half + 1 : -1] = 1 + (number // 4) % 4
        return mask

    def image(self, split: str, name: str) -> np.ndarray:
        mask = self.mask(split, name)
        noise = np.random.default_rng(derive_seed(split, name)).normal(0, 0.1, (3, *mask.shape))
        colors = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, -1]], np.float64)
        return (np.moveaxis(colors[mask], -1, 0) + noise).astype(np.float32)

    def fingerprint(self, split: str) -> str:
        return f"{split}-{self.dims}-{self.side}"


@dataclass(frozen=True)
class Stripes(Source):
    """Image i shows stripes of one of four directions in noise: classification."""

    dims: int
    side: int = 16
    name = "stripes"
    kind = "classification"
    patients = False
    other_label = 0
    space = label_space(["a", "b", "c", "d"], background=None)

    def names(self, split: str) -> list[str]:
        return [f"{split}{i}" for i in range(24 if split == "train" else 60)]

    def mask(self, split: str, name: str) -> np.ndarray:
        return np.asarray(1 + int(name.removeprefix(split)) % 4, np.uint8)

    def image(self, split: str, name: str) -> np.ndarray:
        draw = np.random.default_rng(derive_seed(split, name))
        y, x = np.mgrid[: self.side, : self.side]
        along = (x, y, x + y, x - y)[int(self.mask(split, name)) - 1]
        stripes = 0.5 + 0.4 * np.sin(along * 0.8 + draw.uniform(-0.5, 0.5)) + draw.normal(0, 0.05, (3, *x.shape))
        return stripes.clip(0, 1).astype(np.float32)

    def fingerprint(self, split: str) -> str:
        return f"stripes-{split}-{self.side}"


def _source(network: str) -> Bars | Stripes:
    dims, side, name, _ = NETWORKS[network]
    return (Bars if BUILT[name].kind == "segmentation" else Stripes)(dims, side)


class Shifted(Preparation):
    """Images with a mean of their own."""

    shift: float

    def normalised(self, image: torch.Tensor) -> torch.Tensor:
        return image - self.shift


def _shown(network: str) -> Shifted:
    return Shifted(shift=0.3 if BUILT[NETWORKS[network][2]].kind == "segmentation" else 0.0)


def _stream(network: str, joint: bool) -> Stream:
    stream = class_incremental(_source(network), base=2, step=2, preparation=_shown(network))
    return merged(stream) if joint else stream


@pytest.fixture(params=FITTING, ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def method(pair: tuple[str, str]) -> str:
    return pair[0]


@pytest.fixture
def network(pair: tuple[str, str]) -> str:
    return pair[1]


@pytest.fixture
def learn(tmp_path: Path, method: str, network: str) -> Callable[..., tuple[torch.nn.Module, list[Path]]]:
    """Run the stream with sealed folders in between; ``stop_at`` stops and resumes at a step of the last task."""
    dims, _, name, settings = NETWORKS[network]
    kind = method_class(method)

    def built(brief: bool) -> torch.nn.Module:
        training = TrainingOptions(**SETTINGS | RATES | OWN_SETTINGS.get(method, {}) | ({"epochs": 3} if brief else {}))
        own = (BRIEF if brief else QUICK).get(method, {})
        with seeded(1):
            made = partial(build_network, name, dims, 3, **settings)
            return kind(Setup(kind.Options.model_validate(own), training, made))  # type: ignore[call-arg,return-value]

    def run(
        folder: str, stop_at: int | None = None, options: EngineOptions = OPTIONS, brief: bool = False
    ) -> tuple[torch.nn.Module, list[Path]]:
        stream = _stream(network, kind.sees_all_tasks)
        machine = Machine(options)
        learner, sealed = built(brief), []
        learner.store = FileStore(tmp_path / folder / "kept")
        for task in stream.tasks:
            checkpoint = Checkpoint(tmp_path / folder / "resume", machine, options.save_seconds)
            engine = Engine(machine, options, 1, checkpoint, RunLogger(machine, quiet=True))
            with stream.opened(task):
                _begin(learner, task)
                before = copy.deepcopy(learner)
                if stop_at is not None and task is stream.tasks[-1]:
                    checkpoint.due = _stop_after(stop_at)  # type: ignore[method-assign]
                    with pytest.raises(Interrupted):
                        engine.run(learner, learner.phases(task), task.index, checkpoint.load(learner, task.index))
                    learner = before
                    checkpoint = Checkpoint(tmp_path / folder / "resume", machine, options.save_seconds)
                    engine = Engine(machine, options, 1, checkpoint, RunLogger(machine, quiet=True))
                engine.run(learner, learner.phases(task), task.index, checkpoint.load(learner, task.index))
            checkpoint.clear()
            before = sealed[-1] if sealed else None
            sealed.append(task_folder(tmp_path / folder, task.index, task.name))
            kept, store = (learner.kept(), len(task.seen), learner.files), learner.store
            entries = write_kept(sealed[-1], learner.state_dict(), *kept, store, before)
            write_ledger(sealed[-1], task.name, entries, patients=False)
        return learner.eval(), sealed

    return run


def _begin(learner: torch.nn.Module, task: object) -> None:
    with seeded(2):
        learner.begin(task)


def _stop_after(step: int) -> Callable[[int, bool], tuple[bool, bool]]:
    return lambda now, stopping: (now == step, now == step)


def test_learns_predicts_and_keeps_what_it_says(learn: Callable, method: str, network: str) -> None:
    learner, sealed = learn("run")
    source = _source(network)
    names = source.names("test")
    images = torch.stack([_shown(network).normalised(torch.from_numpy(source.image("test", n))) for n in names])
    labels = torch.stack([torch.from_numpy(source.mask("test", n)).long() for n in names])
    with torch.no_grad():
        prediction = learner.predict(images)
    assert prediction.scores().shape == (len(names), len(prediction.class_ids), *labels.shape[1:])
    assert set(prediction.class_ids) == ({0} if source.kind == "segmentation" else set()) | {1, 2, 3, 4}
    counts = ConfusionMatrix.empty((1, 2, 3, 4))
    counts.add(confusion(labels, prediction.labels(), counts.labels))
    figure = "iou" if source.kind == "segmentation" else "recall"
    found = {c: value.value or 0.0 for c, value in class_values(figure, counts).items()}
    assert min(found[3], found[4]) > 25, f"the newest classes are not learned: {found}"
    # Whole images of new classes say nothing about how old ones compare with new ones: there lwf ends like finetune.
    # clip_ciss holds whether an old class is there, but not its mask on 4 × 4 cells of an encoder that knew nothing. A
    # diffusion network makes nothing to learn from before some hundred steps, which take minutes.
    if method not in ("finetune", "clip_ciss", "cgr") and (method, source.kind) != ("lwf", "classification"):
        assert min(found[1], found[2]) > 55, f"the first classes are forgotten: {found}"
    state, back = learner.state_dict(), read_kept(sealed[-1])
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)
    assert read_files(sealed[-1]) == learner.files
    listed = [entry["name"] for entry in read_ledger(sealed[-1])["items"]]
    assert listed == ["weights", *(item.name for item in learner.kept())]


def test_a_stopped_run_ends_with_the_same_bytes(learn: Callable) -> None:
    # With channels innermost where images have two axes, as on a GPU: memory, frozen copies and resume must bear it.
    options = OPTIONS.model_copy(update={"channels_last": "on"})
    _, whole = learn("whole", options=options, brief=True)
    _, stopped = learn("stopped", stop_at=3, options=options, brief=True)
    for one, two in zip(whole, stopped, strict=True):
        files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
        assert files
        assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)
