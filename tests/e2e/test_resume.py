"""A run that is killed at any moment ends, after ``--resume``, with the bytes of one that was left alone.

Each run is a forked child, so that nothing is imported twice. A child announces what it does (a step, a save, a
file about to be put in place); at the chosen announcement it kills itself.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from perdure import sealing
from perdure.audit.audit import audit
from perdure.config.build import build_experiment
from perdure.config.load import parse_recipe
from perdure.data.sampling import Batches, Mix
from perdure.data.tensors import FileSamples
from perdure.engine import loader
from perdure.engine.phases import Generate
from perdure.errors import Interrupted
from perdure.experiment import run_experiment
from perdure.files import TEMPORARY, read_tensors
from perdure.inference import case
from perdure.kept.items import Kept
from perdure.methods import training
from perdure.methods.finetune import Finetune
from perdure.metrics import evaluate
from perdure.metrics.confusion import read_counts
from perdure.report import page
from perdure.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).parent))
from kills import Say, announce, assert_same, at, child, content, halve_and_kill, kill

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 3,
    "data": {"name": "digits", "size": 32, "train": 14, "val": 2, "test": 4},
    "stream": {"kind": "class_incremental", "base": 4, "step": 3},
    "network": {
        "name": "deeplab",
        "backbone": "tiny_resnet",
        "tiny_channels": [4, 4, 8, 8],
        "output_stride": 4,
        "width": 8,
        "dilations": [1, 2],
    },
    "augment": {"crop": 32, "area": [0.6, 1.0], "flip": 0.0, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
    "evaluate": {"size": None, "batch_size": 4},
    "method": {"name": "star"},
    "training": {"epochs": 2, "later_epochs": 1, "batch_size": 4, "lr": 0.01},
    "engine": {"threads": 1, "trackers": [], "save_seconds": 0, "device": "cpu", "validate_every": 1},
    "report": {"samples": 1},
}


def tiny(**changed: dict[str, Any]) -> dict[str, Any]:
    return {k: {**v, **changed.get(k, {})} if isinstance(v, dict) else v for k, v in TINY.items()}


def run(raw: dict[str, Any], out: Path, resume: bool = False, say: Say | None = None) -> tuple[int, str]:
    """Run a recipe in a child; its text is the error, if there was one."""

    def work() -> None:
        if say is not None:
            announce(say)
        run_experiment(parse_recipe(raw, "tiny"), out, resume, quiet=True)

    return child(work)


def resumed(raw: dict[str, Any], out: Path) -> None:
    status, text = run(raw, out, resume=True)
    assert status == 0, text


# The fixed parts of all tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def shared_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed from the data once is the same for every run here."""
    monkeypatch.setenv("PERDURE_CACHE", str(cache))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, bytes]:
    """Files of a run that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(cache))
        build_experiment(parse_recipe(TINY, "tiny"))  # loads the digits before the first fork
        out = tmp_path_factory.mktemp("whole") / "run"
        status, text = run(TINY, out)
        assert status == 0, text
        page.write_report(out)  # loads matplotlib and the templates here, for all children
    return content(out)


# Killed ---------------------------------------------------------------------------------------------------------

STATE = "replace resume/state.safetensors"
MOMENTS = [
    # while it starts
    ("replace run/stream.json", 1, kill),
    ("replaced run/environment.json", 1, kill),
    ("replace run/files.json", 1, halve_and_kill),
    ("replace run/recipe.yaml", 1, halve_and_kill),
    # in the first task: collect, train (before and after a save), between phases, collect
    ("saved 0.0.1", 1, kill),
    ("step 2", 1, kill),
    ("saved 0.1.2", 1, kill),
    (STATE, 5, halve_and_kill),
    ("saved 0.2.0", 1, kill),
    ("save 0.2.1", 1, kill),
    ("saved 0.3.1", 1, kill),
    # while the first task is sealed, file by file
    ("replace 00-01-04/weights.safetensors", 1, halve_and_kill),
    ("replace kept/statistics.safetensors", 1, kill),
    ("replaced 00-01-04/counts.json", 1, kill),
    ("replace samples/00000.pred.png", 1, halve_and_kill),
    ("replaced 00-01-04/ledger.json", 1, kill),
    ("replaced 00-01-04/done", 1, kill),
    ("replace run/files.json", 2, halve_and_kill),
    ("replaced run/files.json", 2, kill),
    ("rmtree resume", 1, kill),
    # in later tasks, where replayed numbers and the frozen network matter
    ("saved 1.0.1", 1, kill),
    ("save 1.1.1", 1, kill),
    ("saved 1.1.1", 1, kill),
    ("saved 2.1.0", 1, kill),
    ("saved 2.3.1", 1, kill),
    # at the very end
    ("replaced 02-08-10/done", 1, kill),
    ("rmtree resume", 3, kill),
    ("replace run/report.html", 3, halve_and_kill),
    ("replace run/files.json", 4, kill),
]


@pytest.mark.parametrize(("moment", "number", "how"), MOMENTS, ids=[f"{m[0].split('/')[-1]}-{m[1]}" for m in MOMENTS])
def test_a_killed_run_ends_as_if_nothing_had_happened(
    tmp_path: Path, reference: dict[str, bytes], moment: str, number: int, how: Callable[[str], None]
) -> None:
    out = tmp_path / "run"
    status, text = run(TINY, out, say=at(moment, number, how))
    assert status == -signal.SIGKILL, text
    resumed(TINY, out)
    assert_same(out, reference)


# Stopped, refused, out of space -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step 1", "saved 0.2.1"])
def test_a_stop_signal_saves_and_leaves(tmp_path: Path, reference: dict[str, bytes], number: int, moment: str) -> None:
    out = tmp_path / "run"
    status, text = run(TINY, out, say=at(moment, 1, lambda said: os.kill(os.getpid(), number)))
    assert (status, text.split(":")[0]) == (1, Interrupted.__name__)
    assert "everything so far is saved\nthe same command goes on from here" in text
    assert (out / "resume" / "state.safetensors").exists()
    resumed(TINY, out)
    assert_same(out, reference)


def test_replayed_numbers_are_the_same_after_a_kill(tmp_path: Path) -> None:
    """k_c and rho of the second task, as its training sees them."""

    def numbers(out: Path, resume: bool, kill_at: str = "") -> list[Any]:
        """As JSON through a file, from the run's own state at the first save in training."""

        def say(text: str) -> None:
            if text == "saved 1.1.1":
                state = read_tensors(out / "resume" / "state.safetensors")
                found = [state[f"/method/{name}"].tolist() for name in ("replay_amounts", "repeat_factor")]
                (tmp_path / "numbers.json").write_text(json.dumps(found))
            if text in (kill_at, "saved 1.1.1"):
                kill(text)

        assert run(TINY, out, resume, say)[0] == -signal.SIGKILL
        return json.loads((tmp_path / "numbers.json").read_text()) if not kill_at else []

    whole = numbers(tmp_path / "whole" / "run", resume=False)
    numbers(tmp_path / "cut" / "run", resume=False, kill_at="saved 1.0.1")
    assert numbers(tmp_path / "cut" / "run", resume=True) == whole
    assert len(whole[0]) == 4
    assert max(whole[0]) > 0
    assert whole[1] > 0


def test_a_finished_run_stays_as_it_is(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    resumed(TINY, out)  # --resume where there is nothing yet starts
    log = (out / "log.jsonl").read_bytes()
    resumed(TINY, out)
    assert_same(out, reference)
    assert (out / "log.jsonl").read_bytes() == log


def test_who_may_not_write_here_is_told_so_and_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(TINY, out, say=at("saved 0.1.1", 1, kill))[0] == -signal.SIGKILL
    before = content(out)
    with RunFolder(out).locked():
        assert "another command is working on the run folder" in run(TINY, out, resume=True)[1]
    assert "there is a run in" in run(TINY, out)[1]
    other = run(tiny(training={"lr": 0.5}), out, resume=True)
    assert (other[0], "another value of 'training.lr'" in other[1]) == (1, True)
    assert content(out) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    for resume in (False, True):
        assert "is not empty and not a run folder" in run(TINY, tmp_path / "foreign", resume)[1]
    assert content(tmp_path / "foreign") == {"thesis.txt": b"mine"}


def no_space(text: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def safetensors_without_space(text: str) -> None:
    """From here on safetensors fails as it does on a full disk: with an error of its own."""
    import safetensors.torch as library
    from safetensors import SafetensorError

    def save_file(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    library.save_file = save_file


@pytest.mark.parametrize(
    ("moment", "act"),
    [
        (STATE, no_space),
        ("saved 0.2.1", safetensors_without_space),
        ("replace 01-05-07/ledger.json", no_space),
        ("replace run/report.html", no_space),
    ],
)
def test_a_full_disk_is_a_plain_error_and_the_run_goes_on_later(
    tmp_path: Path, reference: dict[str, bytes], moment: str, act: Callable[[str], None]
) -> None:
    out = tmp_path / "run"
    status, text = run(TINY, out, say=at(moment, 1, act))
    assert (status, text.startswith("PerdureError: the disk is full: could not write")) == (1, True), text
    assert "the same command again (`perdure run` with --resume)" in text
    assert not list(out.rglob(f"{TEMPORARY}*"))
    resumed(TINY, out)
    assert_same(out, reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if os.name != "posix" or os.geteuid() or not shutil.which("mount") or subprocess.run(command).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("left", [0, 20_000])
def test_a_disk_that_is_really_full(small_disk: Path, reference: dict[str, bytes], left: int) -> None:
    out, ballast = small_disk / "run", small_disk / "ballast"

    def fill(text: str) -> None:
        ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - left))

    status, text = run(TINY, out, say=at("step 1", 2, fill))
    assert (status, text.startswith("PerdureError: the disk is full: could not write")) == (1, True), text
    refused = run(TINY, out, resume=True)
    assert (refused[0], "GB free" in refused[1]) == (1, True), refused[1]
    ballast.unlink()
    resumed(TINY, out)
    assert_same(out, reference)
    assert all(json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())


# Other ways to train ----------------------------------------------------------------------------------------------


class Dreamer(Finetune):
    """Trains, makes samples one by one, trains on them without data, keeps them."""

    dreams: torch.Tensor | None

    def __init__(self, setup: Any) -> None:
        super().__init__(setup)
        self.register_buffer("dreams", None)

    def phases(self, task: Any) -> list[Any]:
        def make(index: int, progress: Any) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return {"dream": self.network.features(torch.rand(1, 3, 32, 32))}

        def take(files: Any) -> None:
            self.dreams = torch.cat([read_tensors(file)["dream"] for file in files])

        def loss(batch: None) -> dict[str, torch.Tensor]:
            assert self.dreams is not None
            noisy = self.dreams + 0.1 * torch.randn_like(self.dreams)
            return {"dream": self.network.classify(noisy).square().mean()}

        (first,) = super().phases(task)
        generate = Generate("dream", self, 3, make, take)
        return [first, generate, replace(first, name="sleep", loss=loss, data=None, epochs=None, steps=3)]

    def kept(self) -> list[Kept]:
        return [Kept("dreams", "synthetic", ("dreams",), "features of noise")]


class Archivist(Finetune):
    """Keeps what it makes as files, trains on all of them, and drops those of the first task in the third."""

    def __init__(self, setup: Any) -> None:
        super().__init__(setup)
        self.frozen = torch.nn.Linear(40, 50).requires_grad_(False)

    def begin(self, task: Any) -> None:
        super().begin(task)
        if task.index:  # also when a run is restored: the files of the task before have to be there
            self.files["pairs"] = self.files["pairs"][3 * (task.index - 1) :]

    def phases(self, task: Any) -> list[Any]:
        def make(index: int, progress: Any) -> dict[str, torch.Tensor]:
            label = torch.randint(0, len(task.seen) + 1, (32, 32), dtype=torch.int16)
            return {"image": torch.rand(3, 32, 32), "label": label}

        def data() -> Mix:
            pairs = FileSamples(self.store.paths(self.files["pairs"]))
            return Mix((training.batches(task, self.training_options), Batches(pairs, 2)))

        (first,) = super().phases(task)
        return [Generate("make pairs", self, 3, make, keep="pairs"), replace(first, data=data)]

    def kept(self) -> list[Kept]:
        return [Kept("pairs", "synthetic", (), "noise", files="pairs")]


def _as_module(kind: type, monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("a_method_of_this_test")
    setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return f"{module.__name__}:{kind.__name__}"


@pytest.fixture
def dreamer(monkeypatch: pytest.MonkeyPatch) -> str:
    return _as_module(Dreamer, monkeypatch)


@pytest.fixture
def archivist(monkeypatch: pytest.MonkeyPatch) -> str:
    return _as_module(Archivist, monkeypatch)


def chain(raw: dict[str, Any], out: Path, moments: list[str], act: Callable[[str], None] = kill) -> None:
    """Kill a run, go on, kill it again, ..., and let it end."""
    for moment in moments:
        status, text = run(raw, out, resume=True, say=at(moment, 1, act))
        assert status == -signal.SIGKILL or Interrupted.__name__ in text, (moment, text)
    resumed(raw, out)


def test_generated_items_survive_and_are_made_anew_for_each_task(tmp_path: Path, dreamer: str) -> None:
    raw = tiny(method={"name": dreamer})
    status, text = run(raw, tmp_path / "whole" / "run")
    assert status == 0, text
    items = [f"replaced 0{task}-01-dream/00000{i}.safetensors" for task in (0, 2) for i in (0, 2)]
    chain(raw, tmp_path / "cut" / "run", [*items[:2], "saved 0.2.2", "rmtree resume", *items[2:], "step 3"])
    whole = content(tmp_path / "whole" / "run")
    assert_same(tmp_path / "cut" / "run", whole)
    kept = [data for name, data in whole.items() if name.endswith("dreams.safetensors")]
    assert len(set(kept)) == 3


def test_kept_files_survive_and_are_never_copied(tmp_path: Path, archivist: str) -> None:
    raw = tiny(method={"name": archivist}, report={"samples": 0})
    status, text = run(raw, tmp_path / "whole" / "run")
    assert status == 0, text
    out = tmp_path / "cut" / "run"
    first, last = (f"replaced 0{task}-00-make-pairs/000001.safetensors" for task in (0, 2))
    sealing = "replaced 00-01-04/weights.safetensors", "replace 02-08-10/ledger.json"
    chain(raw, out, [first, "saved 0.1.2", sealing[0], "saved 1.1.0", last, "saved 2.1.1", sealing[1]])
    whole = content(tmp_path / "whole" / "run")
    assert_same(out, whole)
    assert audit(out).problems == []
    pairs = [name for name in whole if name.startswith("kept/")]
    assert sorted(pairs) == [f"kept/0{t}-00-make-pairs/00000{i}.safetensors" for t in range(3) for i in range(3)]
    ledgers = [json.loads(whole[name]) for name in sorted(whole) if name.endswith("ledger.json")]
    assert [len(ledger["items"][1]["files"]) for ledger in ledgers] == [3, 6, 6]
    size = len(whole[pairs[0]])
    assert [ledger["total_bytes"]["synthetic"] for ledger in ledgers] == [3 * size, 6 * size, 6 * size]
    holders = {t["file"] for ledger in ledgers for t in ledger["items"][0]["tensors"] if t["name"].startswith("frozen")}
    assert holders == {"tasks/00-01-04/weights.safetensors"}
    damaged = bytearray(whole[pairs[0]])  # dropped since, but the ledger that made it still answers for it
    damaged[-1] ^= 1
    (out / pairs[0]).write_bytes(damaged)
    assert audit(out).problems == [f"{pairs[0]}: its content is not what files.json says (hash differs)"]


VARIANTS = {
    "adamw": {
        "training": {
            "optimizer": "adamw",
            "ema": 0.9,
            "accumulate": 2,
            "clip": 1.0,
            "schedule": "cosine",
            "batch_size": 2,
            "later_epochs": 2,
        }
    },
    "bf16-channels-last": {"engine": {"precision": "bf16", "channels_last": "on"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_other_ways_to_train_resume_as_well(tmp_path: Path, name: str) -> None:
    raw = tiny(**VARIANTS[name])
    status, text = run(raw, tmp_path / "whole" / "run")
    assert status == 0, text
    moments = ["step 2", "saved 0.1.3", "saved 0.2.0", "saved 1.0.1", "save 1.1.1", "saved 1.2.1", "saved 2.1.1"]
    chain(raw, tmp_path / "cut" / "run", moments)
    assert_same(tmp_path / "cut" / "run", content(tmp_path / "whole" / "run"))


def test_reading_processes_change_nothing_and_do_not_hold_the_folder(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    """Also a stop that is sent to all processes at once, as a terminal does, saves first."""

    read = loader._Steps.__getitem__

    def stop_all(self: Any, draws: Any) -> Any:
        os.killpg(0, signal.SIGTERM)  # from the reading process, while the main one waits for it
        return read(self, draws)

    def say(text: str) -> None:
        if text == "replaced run/recipe.yaml":
            os.setpgrp()
            loader._Steps.__getitem__ = stop_all

    raw = tiny(engine={"workers": 1})
    out = tmp_path / "run"
    assert run(raw, out, say=at("step 2", 1, kill))[0] == -signal.SIGKILL
    resumed(raw, out)
    status, text = run(raw, tmp_path / "stopped" / "run", say=say)
    assert (status, text.split(":")[0]) == (1, Interrupted.__name__), text
    shown = ("recipe.yaml", "report.html")  # they show the number of workers
    expected = {name: data for name, data in reference.items() if name not in shown}
    assert_same(out, expected | {name: data for name, data in content(out).items() if name in shown})


# A stream that grows at its end -----------------------------------------------------------------------------------


def in_order(*names: str, **data: int) -> dict[str, Any]:
    enough = {"train": 40, "val": 16, "test": 16, **data}  # each task needs images of its one class
    return tiny(stream={"base": 1, "step": 1, "order": list(names)}, data=enough)


def test_a_sealed_run_goes_on_with_a_stream_that_has_grown(tmp_path: Path) -> None:
    whole, grown = tmp_path / "whole" / "run", tmp_path / "grown" / "run"
    assert run(in_order("three", "one", "seven"), whole)[0] == 0
    assert run(in_order("three", "one"), grown)[0] == 0
    assert [task.name for task in RunFolder(grown).stream().tasks] == ["three", "one"]
    first = content(grown / "tasks")
    assert run(in_order("three", "one", "seven"), grown, resume=True)[0] == 0
    assert {name: data for name, data in content(grown / "tasks").items() if name in first} == first
    assert_same(grown, content(whole))


def test_a_stream_grows_after_a_kill_in_the_middle_of_it(tmp_path: Path) -> None:
    whole, grown = tmp_path / "whole" / "run", tmp_path / "grown" / "run"
    assert run(in_order("three", "one"), whole)[0] == 0
    assert run(in_order("three"), grown)[0] == 0
    for moment in ("replaced run/recipe.yaml", "replaced run/stream.json", "saved 1.1.1"):
        assert run(in_order("three", "one"), grown, resume=True, say=at(moment, 1, kill))[0] == -signal.SIGKILL
    resumed(in_order("three", "one"), grown)
    assert_same(grown, content(whole))


DISJOINT = in_order("three", "one")["stream"] | {"setting": "disjoint"}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (in_order("three", "seven", "one"), "task 2 ('one') of the run is not the same any more: it has another value"),
        (in_order("three"), "task 2 ('one') of the run is not the same any more: the recipe has no such task"),
        (in_order("three", "one", train=39), "has another value of 'data.train'"),
        (
            in_order("three", "one") | {"stream": in_order("three", "one")["stream"] | {"setting": "disjoint"}},
            "has protocol",
        ),
        (in_order("three", "one") | {"augment": TINY["augment"] | {"flip": 0.5}}, "another value of 'augment.flip'"),
    ],
    ids=["other order", "fewer tasks", "other data", "other protocol", "other augmentation"],
)
def test_what_has_been_learned_cannot_be_changed_afterwards(tmp_path: Path, other: dict[str, Any], said: str) -> None:
    out = tmp_path / "run"
    assert run(in_order("three", "one"), out)[0] == 0
    before = content(out)
    status, text = run(other, out, resume=True)
    assert status == 1 and said in text
    assert content(out) == before


def test_a_run_goes_on_without_the_images_of_its_sealed_tasks(tmp_path: Path) -> None:
    """Data sets that may not be kept: what has been learned is learned, only a task under way needs its images."""
    photos = tmp_path / "photos"
    for part in ("images", "masks"):
        (photos / part).mkdir(parents=True)
    draw = np.random.default_rng(0)
    for number in range(12):
        label = np.full((32, 32), number % 3 + 1, np.uint8)
        label[:8] = 0
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(photos / f"images/{number}.png")
        Image.fromarray(label).save(photos / f"masks/{number}.png")
    (photos / "classes.txt").write_text("0 ground\n1 three\n2 one\n3 seven\n")
    for split, numbers in (("train", range(6)), ("test", range(6, 12))):
        (photos / f"{split}.txt").write_text("".join(f"{number}\n" for number in numbers))

    def over(*names: str) -> dict[str, Any]:
        stream = {"kind": "class_incremental", "base": 1, "step": 1, "order": list(names)}
        engine = TINY["engine"] | {"validate_every": 0}  # the folder has no validation images
        return tiny() | {"data": {"name": "folders", "root": str(photos)}, "stream": stream, "engine": engine}

    out, whole = tmp_path / "grown" / "run", tmp_path / "whole" / "run"
    assert run(over("three", "one", "seven"), whole) == (0, "")
    assert run(over("three", "one"), out, say=at("saved 1.1.0", 1, kill))[0] == -signal.SIGKILL
    (photos / "train.txt").write_text("1\n2\n4\n5\n")  # the images of the sealed class three are gone
    resumed(over("three", "one"), out)
    (photos / "train.txt").write_text("2\n5\n")
    resumed(over("three", "one", "seven"), out)
    assert_same(out, content(whole))
    (photos / "train.txt").write_text("2\n")
    assert run(over("three", "one", "seven"), out, resume=True) == (0, "")
    again = tmp_path / "again" / "run"
    (photos / "train.txt").write_text("1\n2\n4\n5\n")
    assert run(over("one", "seven"), again, say=at("saved 0.1.0", 1, kill))[0] == -signal.SIGKILL
    (photos / "train.txt").write_text("1\n2\n5\n")
    status, text = run(over("one", "seven"), again, resume=True)
    assert status == 1 and "1 training images instead of 2" in text


# Methods of the kinds that are planned ------------------------------------------------------------------------------

COMING = {
    "Heads": ["saved 1.0.2", "replaced 01-05-07/weights.safetensors"],
    "TextTable": ["saved 1.0.1", "saved 1.1.1"],
    "Gate": ["saved 1.1.1", "saved 1.2.1", "saved 2.2.0"],
}


def coming(kind: str) -> dict[str, Any]:
    plain = tiny(method={"name": f"coming_kinds:{kind}"}) | {"network": {"name": "coming_kinds:encoder", "width": 8}}
    return plain | {"engine": TINY["engine"] | {"validate_every": 0}}


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module("coming_kinds")


@pytest.mark.parametrize("kind", COMING)
def test_planned_kinds_of_methods_run_resume_and_are_audited(
    tmp_path: Path, kinds: ModuleType, cli: Callable[..., Any], kind: str
) -> None:
    whole = tmp_path / "whole" / "run"
    assert run(coming(kind), whole) == (0, "")
    for number, moment in enumerate(COMING[kind]):
        out = tmp_path / str(number) / "run"
        assert run(coming(kind), out, say=at(moment, 1, kill))[0] == -signal.SIGKILL, moment
        resumed(coming(kind), out)
        assert_same(out, content(whole))
    audited = cli("audit", whole)
    assert audited.code == 0, audited.out
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    told = cli("predict", whole, "--allow-code", "-i", tmp_path / "photo.png", "-o", tmp_path / "masks")
    assert told.code == 0, told.err
    with Image.open(tmp_path / "masks" / "index" / "photo.png") as mask:
        assert mask.size == (50, 40)


def test_a_gate_chooses_its_phases(tmp_path: Path, kinds: ModuleType) -> None:
    out = tmp_path / "run"
    assert run(coming("Gate"), out)[0] == 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    done = {(line["task"], line["phase"]) for line in lines if "phase" in line}
    recovered = [(task, "recover") in done for task in (1, 2, 3)]
    assert recovered == [False, True, True]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda phases: [replace(p, name=f"{p.name} again") for p in phases],
            "but the method now asks for 'learn again'",
        ),
        (lambda phases: islice(phases, 1), "is done, but the method no longer asks for it"),
    ],
    ids=["other", "fewer"],
)
def test_a_decision_that_does_not_follow_from_saved_state_is_refused(
    tmp_path: Path, kinds: ModuleType, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any], said: str
) -> None:
    out = tmp_path / "run"
    assert run(coming("Gate"), out, say=at("saved 1.2.1", 1, kill))[0] == -signal.SIGKILL
    phases = kinds.Gate.phases
    monkeypatch.setattr(kinds.Gate, "phases", lambda self, task: change(phases(self, task)))
    status, text = run(coming("Gate"), out, resume=True)
    assert status == 1 and said in text


def test_143_classes_are_predicted_head_by_head(tmp_path: Path, kinds: ModuleType) -> None:
    """Two heads of 71 and 72 classes on images that show all of them; no part holds more than one head."""
    draw, folder = np.random.default_rng(0), tmp_path / "data"
    for split in ("train", "test"):
        for part in ("images", "masks"):
            (folder / split / part).mkdir(parents=True)
        for number in range(4):
            mask = draw.permutation(144).reshape(12, 12).repeat(2, 0).repeat(2, 1).astype(np.uint8)
            Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")
            picture = draw.integers(0, 255, (24, 24, 3), np.uint8)
            Image.fromarray(picture).save(folder / split / "images" / f"{number}.png")
    (folder / "classes.txt").write_text("".join(f"{k} c{k}\n" for k in range(1, 144)))
    raw = coming("Heads") | {
        "data": {"name": "folders", "root": str(folder)},
        "stream": {"base": 71, "step": 72},
        "augment": TINY["augment"] | {"crop": 24},
        "report": {"samples": 0},
    }

    def work() -> None:
        case.SCORES_AT_ONCE = 72 * 4 * 24 * 24
        predict = partial(case.predict_cases, scores_at_once=case.SCORES_AT_ONCE)
        evaluate.predict_cases = sealing.predict_cases = predict
        run_experiment(parse_recipe(raw, "heads"), tmp_path / "run", quiet=True)
        assert kinds.Heads.largest_part == 72, kinds.Heads.largest_part  # background and the first head; the second

    assert child(work) == (0, "")
    counts = read_counts(RunFolder(tmp_path / "run").sealed()[-1] / "counts.json")["test"]
    assert len(counts.labels) == 144 and counts.cases == 4 and int(counts.truth.sum()) == 4 * 24 * 24
