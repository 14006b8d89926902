"""A run whose method keeps thousands of files: what is written, what the ledgers say, what the audit finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perdure.audit.audit import audit
from perdure.kept import store
from perdure.predict import Trained

PAIRS = '''\
"""Fine-tuning that keeps 1,000 tiny files of each of the first two tasks, and a network that nobody trains."""

import torch

from perdure.engine.phases import Generate
from perdure.kept.items import Kept
from perdure.methods.finetune import Finetune


class Pairs(Finetune):
    def __init__(self, setup):
        super().__init__(setup)
        self.frozen = torch.nn.Linear(100, 100).requires_grad_(False)

    def phases(self, task):
        def make(index, progress):
            return {"x": torch.rand(2)}

        def drop(paths):
            self.files["spare"] = self.files["spare"][:1]

        count = 1000 if task.index < 2 else 0
        spare = Generate("spare", self, 2, make, drop, keep="spare")
        return [*super().phases(task), Generate("pairs", self, count, make, keep="pairs"), spare]

    def kept(self):
        spare = Kept("spare", "preview", (), "noise", files="spare")
        return [Kept("pairs", "synthetic", (), "noise", files="pairs"), spare]
'''


@pytest.fixture(scope="module")
def whole(cli, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The finished run."""
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs_method.py").write_text(PAIRS)
    (folder / "tiny.yaml").write_text(tiny)
    hashed: list[Path] = []
    plain = store.sha256

    def counted(path: Path) -> str:
        hashed.append(path)
        return plain(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(folder / "cache"))
        patch.syspath_prepend(folder)
        patch.setattr(store, "sha256", counted)
        patch.setattr("os.fsync", lambda handle: None)  # speed only
        words = "method=pairs_method:Pairs", "report.samples=0", "--out", folder / "run", "--quiet", "--allow-code"
        done = cli("run", folder / "tiny.yaml", *words)
        assert done.code == 0, done.err
        yield folder / "run"
    assert len(hashed) == len(set(hashed)) == 2 * 1000 + 3 * 2  # once, when they were written


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def ledgers(run: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("tasks/*/ledger.json"))]


def test_ledgers_list_every_file_once_and_what_was_dropped_is_gone(whole: Path) -> None:
    assert audit(whole).problems == []
    pairs, spare = ([ledger["items"][k] for ledger in ledgers(whole)] for k in (1, 2))
    assert [len(item["files"]) for item in pairs] == [1000, 2000, 2000]
    assert [len(item["files"]) for item in spare] == [1, 1, 1]
    assert pairs[1]["files"] == pairs[2]["files"]
    size = (whole / pairs[0]["files"][0]["file"]).stat().st_size
    assert [ledger["total_bytes"]["synthetic"] for ledger in ledgers(whole)] == [1000 * size, 2000 * size, 2000 * size]
    assert len([p for p in (whole / "kept").rglob("*") if p.is_file()]) == 2001


def test_a_network_that_does_not_change_is_stored_once(whole: Path) -> None:
    tensors = [{t["name"]: t["file"] for t in ledger["items"][0]["tensors"]} for ledger in ledgers(whole)]
    first = next(iter(whole.glob("tasks/00-*"))).name
    assert {t["frozen.weight"] for t in tensors} == {f"tasks/{first}/weights.safetensors"}
    written = [set(load_file(path)) for path in sorted(whole.glob("tasks/*/weights.safetensors"))]
    assert ["frozen.weight" in names for names in written] == [True, False, False]
    assert len(written[2]) < len(tensors[2])


def test_prediction_reads_each_tensor_from_the_task_that_wrote_it(run: Path) -> None:
    model = Trained.open(run, "cpu", allow_code=True).method
    files = sorted(run.glob("tasks/*/weights.safetensors"))
    state = model.state_dict()
    assert torch.equal(state["frozen.weight"], load_file(files[0])["frozen.weight"])
    assert all(torch.equal(state[k], v) for k, v in load_file(files[2]).items())
    assert len(model.files["pairs"]) == 2000 and model.store.paths(model.files["pairs"])[1999].is_file()
    shutil.rmtree(run / "kept")  # not needed to predict
    Trained.open(run, "cpu", allow_code=True)


def alter(path: Path) -> None:
    save_file({"x": torch.zeros(2)}, path)


PLACE = "kept/00-01-pairs/000007.safetensors"


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (alter, f"{PLACE}: its content is not what files.json says"),
        (Path.unlink, f"{PLACE}: files.json lists it, but it is missing"),
        (lambda path: alter(path.with_name("x.safetensors")), "kept/00-01-pairs/x.safetensors: no ledger knows this"),
        (lambda path: alter(path.parents[1] / "x"), "kept/x: no ledger knows this file"),
    ],
)
def test_what_the_audit_finds(spoil: Callable[[Path], None], told: str, run: Path) -> None:
    spoil(run / PLACE)
    (problem,) = audit(run).problems
    assert problem.startswith(told)


def test_files_of_a_task_under_way_are_not_in_a_ledger_yet(run: Path, rewrite) -> None:
    next(iter(run.glob("tasks/02-*/done"))).unlink()
    rewrite(run)
    (run / "kept/02-00-more").mkdir()
    alter(run / "kept/02-00-more/000000.safetensors")
    assert audit(run).problems == []
    (run / "kept/03-00-more").mkdir()
    alter(run / "kept/03-00-more/000000.safetensors")
    places = [p.partition(":")[0] for p in audit(run).problems]
    assert places == ["kept/03-00-more/000000.safetensors", "kept/03-00-more"]


def test_ledgers_that_disagree(run: Path, rewrite) -> None:
    path = next(iter(run.glob("tasks/02-*/ledger.json")))
    ledger = json.loads(path.read_text())
    ledger["items"][1]["files"][3]["sha256"] = "0" * 64
    path.write_text(json.dumps(ledger, indent=1, ensure_ascii=False) + "\n")
    found = {p.partition(": ")[0]: p.partition(": ")[2] for p in audit(run).problems}
    assert found["kept/00-01-pairs/000003.safetensors"] == "two ledgers give different hashes"
    rewrite(run)
    assert any(p.startswith("kept/00-01-pairs/000003.safetensors: ") for p in audit(run).problems)


def test_raw_samples_of_patients_in_files(run: Path, rewrite) -> None:
    stream = run / "stream.json"
    stream.write_text(stream.read_text().replace('"patients": false', '"patients": true'))
    for path in run.glob("tasks/*/ledger.json"):
        path.write_text(path.read_text().replace('"patients": false', '"patients": true'))
    rewrite(run)
    assert audit(run).problems == []  # a preview of files that the method made up is no raw image
    for path in run.glob("tasks/*/ledger.json"):
        path.write_text(path.read_text().replace('"synthetic"', '"exemplars"'))
    rewrite(run)
    assert [p.partition(":")[0] for p in audit(run).problems] == [
        "kept/00-01-pairs/000000.safetensors and 999 more files",
        *2 * ["kept/00-01-pairs/000000.safetensors and 1999 more files"],
    ]


def test_sweeping_follows_no_link(tmp_path: Path) -> None:
    """A run folder may come from somebody else: what it links to is not the run's to delete."""
    mine, root = tmp_path / "mine", tmp_path / "run" / "kept"
    mine.mkdir()
    root.mkdir(parents=True)
    (mine / "photo.png").write_bytes(b"mine")
    (root / "00-01-pairs").symlink_to(mine)
    store.FileStore(root).sweep(0, [])
    assert (mine / "photo.png").read_bytes() == b"mine"
    assert not (root / "00-01-pairs").exists()
