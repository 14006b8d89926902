"""The ledger: every byte of a method's state, once, with what it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from perdure.errors import DataError, RunError
from perdure.files import sha256
from perdure.kept.items import Kept
from perdure.kept.ledger import LEDGER, preview_entry, read_ledger, run_of, task_folder, write_ledger
from perdure.kept.method_state import read_files, read_kept, write_kept
from perdure.kept.store import FileStore, item_names

STATE = {
    "network.weight": torch.arange(6.0).reshape(2, 3),
    "network.steps": torch.tensor(7),
    "means": torch.ones(3, 4),
    "counts": torch.arange(3),
    "total": torch.tensor(2.5),
}
ITEM = Kept("means", "statistics", ("means", "counts", "total"), "of each class the mean feature", per_class=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a run's first task."""
    return task_folder(tmp_path, 0, "first")


def test_state_is_split_and_read_back(folder: Path) -> None:
    entries = write_kept(folder, STATE, [ITEM], classes=3)
    write_ledger(folder, "first", entries, patients=False)
    assert set(load_file(folder / "weights.safetensors")) == {"network.weight", "network.steps"}
    assert set(load_file(folder / "kept/means.safetensors")) == {"means", "counts", "total"}
    back = read_kept(folder)
    assert back.keys() == STATE.keys()
    assert all(torch.equal(back[k], STATE[k]) and back[k].dtype == STATE[k].dtype for k in STATE)


def test_entries_say_what_is_in_the_files(folder: Path) -> None:
    weights, means = write_kept(folder, STATE, [ITEM], classes=3)
    assert (weights["name"], weights["kind"], weights["per_class_bytes"]) == ("weights", "weights", None)
    assert weights["bytes"] == 6 * 4 + 8
    assert (means["kind"], means["made_from"]) == ("statistics", "of each class the mean feature")
    assert means["bytes"] == 3 * 4 * 4 + 3 * 8 + 4
    assert means["per_class_bytes"] == 4 * 4 + 8  # the lone number belongs to no class
    assert means["tensors"][0] == {
        "name": "means",
        "shape": [3, 4],
        "dtype": "float32",
        "sha256": hashlib.sha256(STATE["means"].numpy().tobytes()).hexdigest(),
        "file": "tasks/00-first/kept/means.safetensors",
    }
    assert (weights["shows"], means["shows"]) == (None, None)
    for entry in (weights, means):
        (file,) = entry["files"]
        path = run_of(folder) / file["file"]
        assert file["sha256"] == sha256(path)
        assert file["bytes"] == path.stat().st_size
        assert entry["bytes"] == sum(t.nbytes for t in load_file(path).values())


def test_entries_say_how_the_report_shows_them(folder: Path) -> None:
    items = [
        Kept("dreams", "preview", ("means",), "made up", shows="images"),
        Kept("near", "statistics", ("counts",), "distances", shows="distances"),
    ]
    write_ledger(folder, "first", write_kept(folder, STATE, items, classes=3), patients=True)
    read = {i["name"]: (i["shows"], i["patient_data"]) for i in read_ledger(folder)["items"]}
    assert read == {"weights": (None, False), "dreams": ("images", False), "near": ("distances", False)}
    picture = folder / "1.png"
    picture.write_bytes(b"1")
    assert preview_entry(folder, picture, patients=False)["shows"] is None


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = task_folder(tmp_path / name, 0, "first")
        write_ledger(folder, "first", write_kept(folder, STATE, [ITEM], 3), patients=True)
    files = [p.relative_to(tmp_path / "a") for p in sorted((tmp_path / "a").rglob("*")) if p.is_file()]
    assert len(files) == 3
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)


@pytest.mark.parametrize(
    "items",
    [
        [Kept("a", "statistics", ("nothing",), "-")],
        [Kept("a", "statistics", ("means",), "-"), Kept("b", "prototypes", ("means",), "-")],
    ],
)
def test_items_that_claim_what_is_not_theirs(items: list[Kept], folder: Path) -> None:
    with pytest.raises(RunError, match="claims"):
        write_kept(folder, STATE, items, classes=3)
    assert not folder.exists()


@pytest.mark.parametrize("patients", [True, False])
def test_raw_samples_of_patients_are_marked(patients: bool, folder: Path) -> None:
    picture = folder / "samples" / "1.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"1234")
    items = [ITEM, Kept("images", "exemplars", ("network.weight",), "training images")]
    entries = [*write_kept(folder, STATE, items, 3), preview_entry(folder, picture, patients)]
    write_ledger(folder, "first", entries, patients)
    ledger = read_ledger(folder)
    marked = {i["name"]: i["patient_data"] for i in ledger["items"]}
    assert marked == {"weights": False, "means": False, "images": patients, "1": patients}
    assert ledger["total_bytes"] == {"weights": 8, "statistics": 76, "exemplars": 24, "preview": 4}
    assert [f["file"] for f in ledger["items"][-1]["files"]] == ["tasks/00-first/samples/1.png"]


@pytest.mark.parametrize(
    "change",
    [
        lambda ledger: ledger.pop("items"),
        lambda ledger: ledger.pop("total_bytes"),
        lambda ledger: ledger["items"].append(3),
        lambda ledger: ledger["items"][0]["files"][0].pop("sha256"),
        lambda ledger: ledger["items"][0]["files"][0].update(file="tasks/../../else.safetensors"),
        lambda ledger: ledger["items"][0]["tensors"][0].update(file="/etc/weights.safetensors"),
        lambda ledger: ledger["items"][0].update(bytes="many"),
    ],
)
def test_damaged_ledger(change, folder: Path) -> None:
    write_ledger(folder, "first", write_kept(folder, STATE, [ITEM], 3), patients=False)
    ledger = read_ledger(folder)
    change(ledger)
    (folder / LEDGER).write_text(json.dumps(ledger))
    with pytest.raises(DataError, match="is not a ledger"):
        read_ledger(folder)


def sealed(
    tmp_path: Path, index: int, state: dict[str, torch.Tensor], items: list[Kept] | None = None, **files: Any
) -> Path:
    """Seal a task that follows the one before it."""
    folder = task_folder(tmp_path, index, "t")
    before = task_folder(tmp_path, index - 1, "t") if index else None
    entries = write_kept(folder, state, [ITEM] if items is None else items, 3, **files, before=before)
    write_ledger(folder, "t", entries, patients=False)
    return folder


def assert_reads(folder: Path, state: dict[str, torch.Tensor]) -> None:
    back = read_kept(folder)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)


def test_tensors_that_did_not_change_are_not_written_again(tmp_path: Path) -> None:
    frozen = {"frozen.a": torch.rand(50, 20), "frozen.b": torch.zeros(0, 3), "frozen.c": torch.ones(4).bfloat16()}
    states = [
        {**STATE, **frozen},
        {**STATE, **frozen, "network.weight": torch.zeros(2, 3)},
        {**STATE, **frozen, "network.weight": torch.zeros(3, 2), "means": torch.zeros(3, 4)},
    ]
    folders = [sealed(tmp_path, index, state) for index, state in enumerate(states)]
    written = [
        {p.relative_to(f).as_posix(): sorted(load_file(p)) for p in sorted(f.rglob("*.safetensors"))} for f in folders
    ]
    whole = sorted([*frozen, "network.steps", "network.weight"])
    statistics = sorted(ITEM.keys)
    assert written == [
        {"kept/means.safetensors": statistics, "weights.safetensors": whole},
        {"weights.safetensors": ["network.weight"]},  # no statistics: none of them changed
        {"kept/means.safetensors": statistics, "weights.safetensors": ["network.weight"]},  # of one item, all or none
    ]
    for folder, state in zip(folders, states, strict=True):
        assert_reads(folder, state)
    weights, means = read_ledger(folders[2])["items"]
    assert [f["file"] for f in weights["files"]] == ["tasks/00-t/weights.safetensors", "tasks/02-t/weights.safetensors"]
    assert {t["name"]: t["file"][6:8] for t in weights["tensors"]} == {
        "network.weight": "02",
        **dict.fromkeys([*frozen, "network.steps"], "00"),
    }
    assert [f["file"] for f in means["files"]] == ["tasks/02-t/kept/means.safetensors"]
    for folder in folders:  # each byte once, and nothing that a later task replaced
        assert read_ledger(folder)["total_bytes"] == {"weights": 4 * (1000 + 2 + 6) + 8, "statistics": 76}


def test_a_number_that_only_looks_equal_is_written(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    sealed(tmp_path, 0, state, [])
    changed = {"a": torch.tensor([0.0, -0.0]), "b": torch.zeros(2, dtype=torch.int32)}
    assert set(load_file(sealed(tmp_path, 1, changed, []) / "weights.safetensors")) == {"a", "b"}
    assert_reads(task_folder(tmp_path, 1, "t"), changed)


def test_a_task_that_changes_nothing_writes_a_ledger_only(tmp_path: Path) -> None:
    sealed(tmp_path, 0, STATE)
    folder = sealed(tmp_path, 1, STATE)
    assert [p.name for p in folder.iterdir()] == [LEDGER]
    assert_reads(folder, STATE)


def test_files_are_listed_in_the_methods_order_and_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*item_names(0, 2, "dream big", 3)]
    assert names[1] == "00-02-dream-big/000001.safetensors"
    store = FileStore(tmp_path / "kept")
    for name in names:
        store.write(name, {"x": torch.rand(3)})
    pairs = Kept("pairs", "synthetic", ("total",), "made up", files="made")
    rest = Kept("rest", "synthetic", (), "made up", files="rest")
    one = sealed(tmp_path, 0, STATE, [pairs, rest], files={"made": (names[2], names[0]), "rest": ()}, store=store)
    assert read_files(one) == {"made": (names[2], names[0]), "rest": ()}
    entry = read_ledger(one)["items"][1]
    assert [f["file"] for f in entry["files"]] == [
        "tasks/00-t/kept/pairs.safetensors",
        *(f"kept/{names[i]}" for i in (2, 0)),
    ]
    assert all(f["sha256"] == sha256(tmp_path / f["file"]) for f in entry["files"])
    assert entry["bytes"] == 4 + 2 * (tmp_path / "kept" / names[0]).stat().st_size
    # by the next task the contents may even be out of reach: nothing of the listed ones is read
    for name in names[::2]:
        (tmp_path / "kept" / name).unlink()
    again = {"made": (names[0],), "rest": (names[1],)}
    two = sealed(tmp_path, 1, STATE, [pairs, rest], files=again, store=FileStore(tmp_path / "kept"))
    assert read_files(two) == again
    listed = {f["file"]: f for f in entry["files"]}
    assert read_ledger(two)["items"][1]["files"][1] == listed[f"kept/{names[0]}"]


@pytest.mark.parametrize(
    ("items", "files"),
    [
        ([], {"made": ("a/1",)}),  # no item says what they are
        ([Kept("x", "synthetic", (), "-", files="made")], {}),
        ([Kept("x", "synthetic", (), "-", files="m"), Kept("y", "synthetic", (), "-", files="m")], {"m": ("a/1",)}),
        ([Kept("x", "synthetic", (), "-", files="m"), Kept("y", "synthetic", (), "-", files="n")],
         {"m": ("a/1",), "n": ("a/1",)}),
    ],
)  # fmt: skip
def test_files_that_are_not_theirs(items: list[Kept], files: dict[str, tuple[str, ...]], folder: Path) -> None:
    store = FileStore(folder.parents[1] / "kept")
    store.write("a/1", {"x": torch.zeros(1)})
    with pytest.raises(RunError, match=r"claims the files|no kept item says|kept twice"):
        write_kept(folder, STATE, items, 3, files, store)
    assert not folder.exists()


def test_what_a_task_made_and_dropped_goes_and_the_rest_stays(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "kept")
    names = [*item_names(0, 1, "a", 2), *item_names(1, 0, "b", 2), *item_names(1, 1, "c", 2)]
    for name in names:
        store.write(name, {"x": torch.zeros(1)})
    store.sweep(1, names[2:3])
    assert sorted(p.relative_to(tmp_path / "kept").as_posix() for p in (tmp_path / "kept").rglob("*")) == [
        "00-01-a", *names[:2], "01-00-b", names[2]
    ]  # fmt: skip
