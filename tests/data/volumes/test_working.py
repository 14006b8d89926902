"""Working files: samples are pure functions of their seed, and nothing half-written or of a patient stays."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import pickle
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perdure.data.dataset import Dataset, Draw
from perdure.data.sampling import Batches, BatchSampler
from perdure.data.volumes.augmentation import all_seeded, region_size
from perdure.data.volumes.options import VolumeOptions
from perdure.data.volumes.plan import plan_slices, plan_volumes
from perdure.data.volumes.preprocessing import Volume3D
from perdure.data.volumes.sampled import Sampled
from perdure.data.volumes.working import MARKER, WorkingFiles, prepare_working_files
from perdure.engine.loader import read_draws
from perdure.errors import DataError, PerdureError, RunError, SealedDataError
from perdure.labels import IGNORE, TABLE_SIZE

from .conftest import Volumes

OPTIONS = VolumeOptions(patch=(8, 16, 12))
Maker = Callable[..., Volumes]


@pytest.fixture(params=["volumes", "slices"])
def plan(request: pytest.FixtureRequest, phantoms: Maker) -> Sampled:
    if request.param == "slices":
        return plan_slices(phantoms(), VolumeOptions(size=24))
    return plan_volumes(phantoms(), OPTIONS)


def prepare(source: Volumes, plan: Sampled, folder: Path, **others: Any) -> WorkingFiles:
    return prepare_working_files(source, "train", source.names("train"), plan, folder, **others)


def test_samples_equal_those_of_arrays_in_memory(plan: Sampled, phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms()
    files = prepare(source, plan, tmp_path / "work")
    for case in source.cases:
        ready = plan.ready(case)
        for seed in range(12):
            sample = files.sample(case.name, plan, seed)
            image, label = plan.cut(ready, seed)
            assert torch.equal(sample.image, image) and torch.equal(sample.label, label)
            assert sample.image.shape == (1, *plan.patch) and sample.image.dtype == torch.float32
            assert sample.label.shape == plan.patch and sample.label.dtype == torch.int64
            assert set(sample.label.unique().tolist()) <= {0, 1, 2} and sample.name == case.name
    first, other = (files.sample(source.cases[0].name, plan, seed).image for seed in (1, 2))
    assert not torch.equal(first, other)


PROCESS = """
from __future__ import annotations
import hashlib, json, sys
import torch
from pathlib import Path
from perdure.data.preparation import read_preparation
from perdure.data.volumes.working import WorkingFiles
DRAWN
for folder, plan, names in json.loads(sys.argv[1]):
    print(drawn(WorkingFiles(Path(folder), tuple(names)), read_preparation(plan, "plan")))
"""


def drawn(files: WorkingFiles, plan: Sampled) -> str:
    """Digest of some samples."""
    digest = hashlib.sha256()
    torch.set_num_threads(1)
    for seed in range(30):
        sample = files.sample(files.names[seed % len(files.names)], plan, seed * 2**33 + seed)
        digest.update(sample.image.numpy().tobytes() + sample.label.numpy().tobytes())
    return digest.hexdigest()


def test_another_process_draws_the_same(phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms()
    plans = plan_volumes(source, OPTIONS), plan_slices(source, VolumeOptions(size=24))
    made = [(prepare(source, plan, tmp_path / plan.kind), plan) for plan in plans]
    told = json.dumps([[str(files.folder), plan.model_dump(mode="json"), files.names] for files, plan in made])
    code = PROCESS.replace(
        "DRAWN", inspect.getsource(drawn).replace("files: WorkingFiles, plan: Sampled", "files, plan")
    )
    ran = subprocess.run([sys.executable, "-c", code, told], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [drawn(files, plan) for files, plan in made]


def test_draws_leave_the_global_generators_alone(plan: Sampled, phantoms: Maker, tmp_path: Path) -> None:
    files = prepare(phantoms(), plan, tmp_path / "work")
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(4), np.random.rand(4)
    torch.manual_seed(3)
    np.random.seed(3)
    files.sample("patient 1", plan, 77)
    assert torch.equal(torch.rand(4), expected[0]) and np.array_equal(np.random.rand(4), expected[1])


def test_seeds_differ_in_all_their_bits() -> None:
    drawn = set()
    for seed in (0, 1, 1 << 32, 1 << 40, (1 << 40) + 1):
        with all_seeded(seed):
            drawn.add(float(np.random.rand()))
    assert len(drawn) == 5


def test_only_the_region_is_read(phantoms: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = phantoms(1, size=(40, 90, 90), spacing=(1.0, 1.0, 1.0))
    plan = plan_volumes(source, VolumeOptions(patch=(8, 8, 8), augment="none"))
    files = prepare(source, plan, tmp_path / "work")
    seen: list[int] = []
    from perdure.data.volumes import working

    whole = working._Stored.__getitem__
    monkeypatch.setattr(
        working._Stored, "__getitem__", lambda self, index: [out := whole(self, index), seen.append(out.size)][0]
    )
    files.sample("patient 0", plan, 4)
    assert len(seen) == 2 and max(seen) <= 8**3


@pytest.mark.parametrize("foreground", [0.0, 1.0])
def test_the_share_of_samples_with_a_label(foreground: float, phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms(1, size=(24, 40, 40), spacing=(1.0, 1.0, 1.0))
    options = VolumeOptions(patch=(4, 4, 4), foreground=foreground, augment="none", size=32)
    for plan in (plan_volumes(source, options), plan_slices(source, options)):
        files = prepare(source, plan, tmp_path / plan.kind)
        samples = [files.sample("patient 0", plan, seed).label for seed in range(40)]
        share = sum(bool(label.any()) for label in samples) / len(samples)
        assert share == 1.0 if foreground else share < 0.95
        if foreground and plan.dims == 3:  # each class is drawn as often
            middle = [int(label[2, 2, 2]) for label in samples]
            assert 10 < middle.count(1) < 30 and middle.count(1) + middle.count(2) == 40


def test_small_volumes_are_padded_and_borders_are_reached(phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms(1, size=(6, 20, 20), spacing=(1.0, 1.0, 1.0))
    plan = plan_volumes(source, VolumeOptions(patch=(12, 16, 16), augment="none", foreground=0.0))
    files = prepare(source, plan, tmp_path / "work")
    ready = plan.ready(source.cases[0])
    corners = set()
    for seed in range(60):
        sample = files.sample("patient 0", plan, seed)
        assert (sample.image[0, :3] == 0).all() and (sample.image[0, 9:] == 0).all()
        assert not sample.label[:3].any()
        at = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(sample.image[0, 3:9], ready.image[0, :, y : y + 16, x : x + 16])
        ]
        corners.update(at)
    assert {y for y, _ in corners} == set(range(5)) == {x for _, x in corners}


def test_augmentation_reads_more_than_it_shows() -> None:
    assert region_size((32, 32, 32), "none") == region_size((32, 32, 32), "mirror") == (32, 32, 32)
    assert all(side > 40 for side in region_size((32, 32, 32), "nnunet"))
    flat = region_size((8, 64, 64), "nnunet")
    assert flat[0] == 8 and flat[1] > 64  # thin patches are turned within their slices alone


def test_mirrored_samples_are_mirrored_together(phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms(1)
    plan = plan_volumes(source, OPTIONS.model_copy(update={"augment": "mirror", "foreground": 1.0}))
    files = prepare(source, plan, tmp_path / "work")
    still = plan.model_copy(update={"augment": "none"})
    turned = set()
    for seed in range(24):
        ours, plain = files.sample("patient 0", plan, seed), files.sample("patient 0", still, seed)
        axes = next(
            axes
            for axes in ([], [0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2])
            if torch.equal(ours.image, plain.image.flip([a + 1 for a in axes]))
        )
        assert torch.equal(ours.label, plain.label.flip(axes))
        turned.add(tuple(axes))
    assert len(turned) > 4


def test_ignored_voxels_stay_and_a_random_sample_shows_some_annotation(phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms(1, ignored=True)
    for plan in (
        plan_volumes(source, VolumeOptions(patch=(4, 4, 4), augment="none", foreground=0.0)),
        plan_slices(source, VolumeOptions(size=24, augment="none", foreground=0.0)),
    ):
        files = prepare(source, plan, tmp_path / plan.kind)
        labels = [files.sample("patient 0", plan, seed).label for seed in range(60)]
        assert all((label != IGNORE).any() for label in labels)
        assert plan.kind == "slices2d" or any((label == IGNORE).any() for label in labels)


def test_files_have_no_names_of_patients(plan: Sampled, phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms()
    files = prepare(source, plan, tmp_path / "work")
    inside = sorted(file.name for file in files.folder.iterdir())
    assert inside == sorted(
        [MARKER, *(f"{n:05d}.{kind}" for n in range(3) for kind in ("image.b2nd", "label.b2nd", "places.npz"))]
    )
    assert not any(b"patient" in file.read_bytes() for file in files.folder.iterdir())


def test_a_stopped_preparation_goes_on_with_the_next_case(plan: Sampled, phantoms: Maker, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, of: int) -> None:
        if done == 2:
            raise Stop

    source, folder = phantoms(4), tmp_path / "work"
    with pytest.raises(Stop):
        prepare(source, plan, folder, progress=stop)
    (folder / "00002.image.b2nd").write_bytes(b"a kill came before the last file of this case")
    (folder / ".part-xyz.b2nd").write_bytes(b"half")
    source.reads.clear()
    told: list[tuple[int, int]] = []
    again = prepare(source, plan, folder, progress=lambda done, of: told.append((done, of)))
    assert told == [(3, 4), (4, 4)]
    # once more for the digest of the content, which reads image and mask of each
    assert [source.reads.count(f"patient {n}") for n in range(4)] == [2, 2, 3, 3]
    fresh = prepare(phantoms(4), plan, tmp_path / "fresh")
    for file in fresh.folder.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert not list(folder.glob(".part*")) and again.names == fresh.names


def test_files_of_other_cases_or_settings_are_refused(plan: Sampled, phantoms: Maker, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    prepare(phantoms(), plan, folder)
    changed = phantoms()
    changed.cases = [replace(changed.cases[0], image=changed.cases[0].image + 1), *changed.cases[1:]]
    for source, shown in ((phantoms(4), plan), (changed, plan), (phantoms(), plan.model_copy(update={"overlap": 0.1}))):
        with pytest.raises(RunError) as told:
            prepare(source, shown, folder)
        assert told.value.what == f"{folder} holds working files of other cases or settings"
    prepare(phantoms(), plan, folder)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match=r"full is not empty: it holds thesis\.txt"):
        prepare(phantoms(), plan, full)
    assert (full / "thesis.txt").read_text() == "mine"


def test_a_full_disk_is_told_before_the_first_file(
    plan: Sampled, phantoms: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 5_000))
    with pytest.raises(RunError, match=r"working files need about 0\.0 GB, the disk of .*work has 0\.0 GB free"):
        prepare(phantoms(), plan, tmp_path / "work")
    assert not list((tmp_path / "work").glob("0*"))


def test_a_disk_that_becomes_full_leaves_whole_files_only(
    plan: Sampled, phantoms: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, write = tmp_path / "work", Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if len(list(folder.glob("0*.b2nd"))) == 3:
            write(path, data[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr("perdure.data.volumes.working.Path.write_bytes", full)
    with pytest.raises(PerdureError, match=r"the disk is full: could not write .*00001\.label\.b2nd") as told:
        prepare(phantoms(), plan, folder)
    assert "--resume" in told.value.hint and not list(folder.glob(".part*"))
    monkeypatch.undo()
    files = prepare(phantoms(), plan, folder)
    assert files.sample("patient 1", plan, 0).image.shape == (1, *plan.patch)


@pytest.mark.parametrize("damage", ["image.b2nd", "label.b2nd", "places.npz", "all"])
@pytest.mark.parametrize("how", ["missing", "short", "empty"])
def test_damaged_files_are_told(damage: str, how: str, plan: Sampled, phantoms: Maker, tmp_path: Path) -> None:
    files = prepare(phantoms(), plan, tmp_path / "work")
    for file in files.folder.iterdir():
        if damage == "all" or file.name.endswith(damage):
            content = file.read_bytes()
            file.unlink()
            if how != "missing":
                file.write_bytes(content[: len(content) // 2] if how == "short" else b"")
    with pytest.raises(DataError, match=r"a working file in .*work is missing or damaged"):
        files.sample("patient 0", plan, 0)


def test_a_data_set_takes_its_samples_from_working_files(phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms()
    source.cases = [replace(case, annotated=frozenset({2})) for case in source.cases]
    plan: Volume3D = plan_volumes(source, OPTIONS)
    files = prepare(source, plan, tmp_path / "work")
    table = np.zeros(TABLE_SIZE, np.int16)
    table[[1, 2, IGNORE]] = 11, 12, IGNORE
    closed: list[bool] = []

    def check() -> None:
        if closed:
            raise SealedDataError("sealed")

    names = tuple(source.names("train"))
    data = Dataset(source, "train", names, table, plan, True, check, frozenset({11, 12}), files)
    source.reads.clear()
    raw, sample = files.sample("patient 1", plan, 9), data[Draw(1, 9)]
    assert torch.equal(sample.image, raw.image) and sample.label.dtype == torch.int64
    assert torch.equal(sample.label, torch.from_numpy(table)[raw.label].long()) and sample.label.max() > 10
    assert sample.annotated == frozenset({12}) and raw.annotated == frozenset({2})
    assert not source.reads  # no raw case was opened
    # a class that is not taught here becomes background, and no sample is centred on it
    table[1] = 0
    forced = plan.model_copy(update={"foreground": 1.0, "augment": "none"})
    only = replace(data, preparation=forced, table=table)
    assert all(only[Draw(0, seed)].label[4, 8, 6] == 12 for seed in range(20))
    whole = replace(data, training=False)[0]
    assert whole.grid is not None and whole.label.shape == source.cases[0].label.shape
    closed.append(True)
    with pytest.raises(SealedDataError):
        data[0]


def test_workers_draw_the_same(plan: Sampled, phantoms: Maker, tmp_path: Path) -> None:
    source = phantoms()
    files = prepare(source, plan, tmp_path / "work")
    table = np.arange(TABLE_SIZE, dtype=np.int16)
    data = Dataset(source, "train", tuple(source.names("train")), table, plan, True, working=files)
    draws = BatchSampler(Batches(data, 3), 5, 0, 4)
    torch.set_num_threads(1)
    alone, parallel = (
        [torch.stack([case.image for case in step or []]) for step in read_draws(draws, lambda c, _: c, workers)]
        for workers in (0, 2)
    )
    assert all(map(torch.equal, alone, parallel)) and len(alone) == 4
    assert pickle.loads(pickle.dumps(files)) == files
