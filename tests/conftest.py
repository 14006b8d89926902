"""Shared fixtures. Thread counts are set before torch is imported so that parallel workers do not fight."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import contextlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

TINY = """\
name: tiny
about: the smallest run of STAR with features as wide as the paper's
seed: 3
data: {name: digits, size: 32, train: 24, val: 4, test: 8}
stream: {kind: class_incremental, base: 6, step: 2, setting: overlap}
network: {backbone: tiny_resnet, tiny_channels: [4, 4, 8, 8], output_stride: 4, width: 256, dilations: [1]}
augment: {crop: 32, area: [0.6, 1.0], flip: 0.0, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25]}
evaluate: {size: null, batch_size: 4}
method: {name: star}
training: {epochs: 1, later_epochs: 1, batch_size: 8, lr: 0.01, later_lr: 0.002}
engine: {device: cpu, threads: 1}
report: {samples: 2}
"""


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with small real data sets: $PERDURE_TEST_DATA, or ``shared/data`` beside the checkout."""
    named = os.environ.get("PERDURE_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real data sets are absent (set PERDURE_TEST_DATA to their folder)")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test its own cache folder and one thread."""
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "cache"))


VOLUMES = """\
name: tiny-volumes
about: the smallest run of two partly labelled sets of volumes
seed: 1
stream:
  kind: data_sets
  tasks:
    - {name: organs, data: {name: phantoms, kind: torso, set: organs, size: 32, train: 2, test: 2}}
    - {name: vessels, data: {name: phantoms, kind: torso, set: vessels, size: 32, train: 2, test: 2}}
network: {name: residual_unet, widths: [4, 8]}
volumes: {plan: given, spacing: [12, 10, 10], patch: [16, 16, 16], augment: none}
method: finetune
training: {optimizer: adamw, steps: 3, later_steps: 2, batch_size: 1, lr: 0.003}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 2}
"""


class Ran(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


def run_cli(*arguments: object) -> Ran:
    """Run the command line in this process."""
    from perdure.cli import main

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["perdure", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
    return Ran(int(left.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Callable[..., Ran]:
    """Call it with the words of a command."""
    return run_cli


@pytest.fixture(scope="session")
def tiny() -> str:
    """Text of a recipe that runs in a few seconds: STAR, 3 tasks of digits."""
    return TINY


@pytest.fixture(scope="session")
def star_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of the tiny recipe. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("star")
    (folder / "tiny.yaml").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(folder / "cache"))
        done = run_cli("run", folder / "tiny.yaml", "--out", folder / "run", "--quiet")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture(scope="session")
def volume_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of two sets of volumes. Copy it before you change it."""
    pytest.importorskip("nnunetv2")
    folder = tmp_path_factory.mktemp("volumes")
    (folder / "tiny.yaml").write_text(VOLUMES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(folder / "cache"))
        done = run_cli("run", folder / "tiny.yaml", "--out", folder / "run", "--quiet")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def rewrite() -> Callable[[Path], None]:
    """Call it with a run after a change."""
    return _rewrite


def _rewrite(run: Path) -> None:
    """Make files.json, results and pages anew after a change, as the run itself would have written them."""
    from perdure.kept.manifest import KINDS, MANIFEST, event_files
    from perdure.run_folder import RunFolder
    from perdure.sealing import publish, record

    folder = RunFolder(run)
    (run / MANIFEST).unlink()
    sealed = folder.sealed()
    record(folder)
    publish(folder)
    folder.list_files([*KINDS, *event_files(run)], sealed)
