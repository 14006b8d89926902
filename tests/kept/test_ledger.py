"""The ledger: every byte of a method's state, once, with what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perdure.errors import DataError, RunError
from perdure.files import sha256
from perdure.kept.items import Kept
from perdure.kept.ledger import LEDGER, preview_entry, read_kept, read_ledger, write_kept, write_ledger

STATE = {
    "network.weight": torch.arange(6.0).reshape(2, 3),
    "network.steps": torch.tensor(7),
    "means": torch.ones(3, 4),
    "counts": torch.arange(3),
    "total": torch.tensor(2.5),
}
ITEM = Kept("means", "statistics", ("means", "counts", "total"), "of each class the mean feature", per_class=True)


def test_state_is_split_and_read_back(tmp_path: Path) -> None:
    entries = write_kept(tmp_path, STATE, [ITEM], classes=3)
    write_ledger(tmp_path, "first", entries, patients=False)
    assert set(load_file(tmp_path / "weights.safetensors")) == {"network.weight", "network.steps"}
    assert set(load_file(tmp_path / "kept/means.safetensors")) == {"means", "counts", "total"}
    back = read_kept(tmp_path)
    assert back.keys() == STATE.keys()
    assert all(torch.equal(back[k], STATE[k]) and back[k].dtype == STATE[k].dtype for k in STATE)


def test_entries_say_what_is_in_the_files(tmp_path: Path) -> None:
    weights, means = write_kept(tmp_path, STATE, [ITEM], classes=3)
    assert (weights["name"], weights["kind"], weights["per_class_bytes"]) == ("weights", "weights", None)
    assert weights["bytes"] == 6 * 4 + 8
    assert (means["kind"], means["made_from"]) == ("statistics", "of each class the mean feature")
    assert means["bytes"] == 3 * 4 * 4 + 3 * 8 + 4
    assert means["per_class_bytes"] == 4 * 4 + 8  # the lone number belongs to no class
    assert means["tensors"][0] == {"name": "means", "shape": [3, 4], "dtype": "float32"}
    assert (weights["shows"], means["shows"]) == (None, None)
    for entry in (weights, means):
        path = tmp_path / entry["file"]
        assert entry["sha256"] == sha256(path)
        assert entry["file_bytes"] == path.stat().st_size
        assert entry["bytes"] == sum(t.nbytes for t in load_file(path).values())


def test_entries_say_how_the_report_shows_them(tmp_path: Path) -> None:
    items = [
        Kept("dreams", "preview", ("means",), "made up", shows="images"),
        Kept("near", "statistics", ("counts",), "distances", shows="distances"),
    ]
    write_ledger(tmp_path, "first", write_kept(tmp_path, STATE, items, classes=3), patients=True)
    read = {i["name"]: (i["shows"], i["patient_data"]) for i in read_ledger(tmp_path)["items"]}
    assert read == {"weights": (None, False), "dreams": ("images", False), "near": ("distances", False)}
    picture = tmp_path / "1.png"
    picture.write_bytes(b"1")
    assert preview_entry(tmp_path, picture, patients=False)["shows"] is None


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_ledger(tmp_path / name, "first", write_kept(tmp_path / name, STATE, [ITEM], 3), patients=True)
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
def test_items_that_claim_what_is_not_theirs(items: list[Kept], tmp_path: Path) -> None:
    with pytest.raises(RunError, match="claims"):
        write_kept(tmp_path, STATE, items, classes=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("patients", [True, False])
def test_raw_samples_of_patients_are_marked(patients: bool, tmp_path: Path) -> None:
    picture = tmp_path / "samples" / "1.png"
    picture.parent.mkdir()
    picture.write_bytes(b"1234")
    items = [ITEM, Kept("images", "exemplars", ("network.weight",), "training images")]
    entries = [*write_kept(tmp_path, STATE, items, 3), preview_entry(tmp_path, picture, patients)]
    write_ledger(tmp_path, "first", entries, patients)
    ledger = read_ledger(tmp_path)
    marked = {i["name"]: i["patient_data"] for i in ledger["items"]}
    assert marked == {"weights": False, "means": False, "images": patients, "1": patients}
    assert ledger["total_bytes"] == {"weights": 8, "statistics": 76, "exemplars": 24, "preview": 4}
    assert ledger["items"][-1]["file"] == "samples/1.png"


@pytest.mark.parametrize(
    "change",
    [
        lambda ledger: ledger.pop("items"),
        lambda ledger: ledger.pop("total_bytes"),
        lambda ledger: ledger["items"].append(3),
        lambda ledger: ledger["items"][0].pop("sha256"),
        lambda ledger: ledger["items"][0].update(bytes="many"),
    ],
)
def test_damaged_ledger(change, tmp_path: Path) -> None:
    write_ledger(tmp_path, "first", write_kept(tmp_path, STATE, [ITEM], 3), patients=False)
    ledger = read_ledger(tmp_path)
    change(ledger)
    (tmp_path / LEDGER).write_text(json.dumps(ledger))
    with pytest.raises(DataError, match="is not a ledger"):
        read_ledger(tmp_path)
