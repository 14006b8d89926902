"""The audit lists every kept byte and fails on everything that should not be in a run."""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perdure import methods
from perdure.audit.audit import audit
from perdure.audit.findings import Audit
from perdure.audit.names import audit_names, identifying_names
from perdure.audit.texts import PHASES
from perdure.cli.audit import show
from perdure.kept.ledger import is_raw
from perdure.kept.manifest import list_files
from perdure.labels import wrong_name

LAST = "tasks/02-09-10"


def test_finished_star_run_passes_and_lists_every_byte(cli, star_run: Path) -> None:
    done = cli("audit", star_run)
    assert (done.code, done.err) == (0, "")
    assert "2,060" in done.out and "audit passed" in done.out and "mean feature" in done.out
    found = json.loads(cli("audit", star_run, "--json").out)
    assert found["passed"] and found["problems"] == []
    listed = {f["file"]: f for i in found["items"] for f in i["files"]}
    stored = [p for p in star_run.rglob("*") if p.suffix in (".safetensors", ".png")]
    assert sorted(listed) == sorted(p.relative_to(star_run).as_posix() for p in stored)
    assert all(listed[p.relative_to(star_run).as_posix()]["bytes"] == p.stat().st_size for p in stored)
    for item in found["items"]:
        tensors = {t["name"]: load_file(star_run / t["file"])[t["name"]] for t in item["tensors"]}
        assert all(list(tensors[t["name"]].shape) == t["shape"] for t in item["tensors"])
        if item["kind"] != "preview":
            assert item["bytes"] == sum(t.nbytes for t in tensors.values())


def test_star_keeps_2060_bytes_a_class_and_4_more(star_run: Path) -> None:
    statistics = [i for i in audit(star_run).items if i["kind"] == "statistics"]
    assert [i["bytes"] for i in statistics] == [6 * 2060 + 4, 8 * 2060 + 4, 10 * 2060 + 4]
    assert {i["per_class_bytes"] for i in statistics} == {2060}
    shapes = {t["name"]: t["shape"] for t in statistics[-1]["tensors"]}
    assert shapes == {
        "prototypes": [10, 256],
        "spreads": [10, 256],
        "norms": [10, 2],
        "counts": [10],
        "background_count": [],
    }


def test_bytes_by_kind_are_those_of_the_last_task(star_run: Path) -> None:
    found = audit(star_run)
    sums: dict[str, int] = {}
    for item in found.items:
        if item["task"] == "02-09-10":
            sums[item["kind"]] = sums.get(item["kind"], 0) + item["bytes"]
    assert found.bytes_by_kind == sums
    assert set(sums) == {"weights", "statistics", "preview"}


def fails(run: Path, *words: str) -> None:
    """Check that the audit has exactly one problem, which holds some words."""
    problems = audit(run).problems
    assert len(problems) == 1, problems
    assert all(word in problems[0] for word in words), problems


@pytest.mark.parametrize(
    "place",
    [
        "image.png",
        "notes.bin",
        f"{LAST}/kept/more.safetensors",
        f"{LAST}/samples/77.png",
        "tasks/03-extra/patient.png",
        "resume/state.safetensors",
        "tracking/tiny/patient.png",
        ".part-1234.png",
        ".hidden",
    ],
)
def test_unknown_file(place: str, run: Path, cli) -> None:
    (run / place).parent.mkdir(exist_ok=True)
    (run / place).write_bytes(b"x")
    problems = audit(run).problems
    assert problems[0] == f"{place}: no ledger knows this file"
    assert all("no folder of this name" in problem for problem in problems[1:])
    done = cli("audit", run)
    assert (done.code, done.err) == (1, "")
    assert f"problem {place}: no ledger knows" in done.out


def test_link(run: Path, tmp_path: Path) -> None:
    (run / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    fails(run, "elsewhere", "is a link")


@pytest.mark.parametrize("verb", ["audit", "report"])
def test_a_log_that_is_a_pipe_is_not_waited_for(verb: str, run: Path, cli) -> None:
    (run / "log.jsonl").unlink()
    os.mkfifo(run / "log.jsonl")
    done = cli(verb, run)
    told = "log.jsonl: is no file" in done.out
    assert (done.code, told) == ((1, True) if verb == "audit" else (0, False)), done.out + done.err


@pytest.mark.parametrize("file", ["weights.safetensors", "kept/statistics.safetensors", "samples/00000.image.png"])
def test_changed_bytes(file: str, run: Path) -> None:
    path = run / LAST / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    first, *more = audit(run).problems
    assert first == f"{LAST}/{file}: its content is not what files.json says (hash differs)"
    # the report holds the pictures of samples as they are: what it would be now is another page
    assert [problem.partition(":")[0] for problem in more] == (["report.html"] if file.endswith(".png") else [])


def test_missing_file(run: Path) -> None:
    (run / LAST / "kept/statistics.safetensors").unlink()
    fails(run, f"{LAST}/kept/statistics.safetensors", "missing")


def test_damaged_ledger(run: Path, cli) -> None:
    (run / LAST / "ledger.json").write_text("{")
    problems = audit(run).problems
    assert problems[0].startswith(f"{LAST}/ledger.json: cannot be used")
    assert any("weights.safetensors: no ledger knows this file" in p for p in problems)
    assert cli("audit", run).code == 1


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tasks": 3, "patients": false}'])
def test_damaged_stream(content: str, run: Path) -> None:
    (run / "stream.json").write_text(content)
    assert any("stream.json" in p for p in audit(run).problems)


def names_in(place: str, text: str, folder: Path) -> list[str]:
    """What is said of the only file of a folder."""
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).write_text(text)
    found = Audit()
    audit_names(folder, [place], found)
    return found.problems


@pytest.mark.parametrize(
    "text",
    [
        "/home/someone/data",
        "see (/scratch/projects/scans)",
        "root: /scans/x/photos/",
        "C:\\\\Users\\\\someone",
        "C:\\Users\\someone",
        "\\\\server\\share",
        "file:///nfs/x",
        '"/mnt/a b"',
    ],
)
def test_path_of_a_machine(text: str, tmp_path: Path) -> None:
    (problem,) = names_in("card.md", f"a\n{text}\n", tmp_path)
    assert problem.startswith("card.md: holds a path of a machine")
    assert "looks like a path" in wrong_name(text), "such a class would be learned, and every audit fail"


@pytest.mark.parametrize(
    "text",
    ["https://example.org/a/b/c", "</b></i>", "images/png/x", "1/2/3", "a / b", "km/h", "…/weights.pth", "14px/1.5"],
)
def test_no_path_of_a_machine(text: str, tmp_path: Path) -> None:
    assert names_in("card.md", f"a\n{text}\n", tmp_path) == []
    assert not wrong_name(text)


@pytest.mark.parametrize("name", ["/etc", "~/x", "..", "../../etc", "a/../b", "C:/x", "C:\\x", "\\a\\b", "a</b/c"])
def test_no_class_is_called_like_a_path_that_only_some_texts_show(name: str) -> None:
    """Some are no absolute path, some become one where JSON doubles a backslash or HTML writes a sign in letters."""
    assert wrong_name(name) == f"the name '{name}' looks like a path"


@pytest.mark.parametrize("name", ["1/2", "liver/spleen", "left (upper/lower)", "a..b", "T1: x", "\\alpha", "x~y"])
def test_a_class_may_be_called_so(name: str) -> None:
    assert not wrong_name(name)


@pytest.mark.parametrize("name", ["node77", "meduser7"])
@pytest.mark.parametrize("place", ["report.html", "log.jsonl", "a/counts.json"])
def test_name_of_the_machine_or_the_user(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node77.cluster.example.org")
    monkeypatch.setattr(getpass, "getuser", lambda: "meduser7")
    assert names_in(place, "by nobody.", tmp_path) == []
    (problem,) = names_in(place, f"by {name}.", tmp_path)
    assert "name of this machine or user" in problem


def test_name_of_the_machine_in_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "node77")
    (problem,) = names_in("events.out.tfevents.1.node77.5.0", "", tmp_path)
    assert "name of this machine or user" in problem


@pytest.mark.parametrize("user", ["root", "ubuntu", "me", "star", "recipe"])
def test_names_that_tell_nothing(user: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(getpass, "getuser", lambda: user)
    assert identifying_names() == []
    assert audit(run).passed


def test_process_without_an_account(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(getpass, "getuser", nobody)
    assert audit(run).passed


def test_run_that_kept_images_of_patients(hoard: Callable[..., Path], cli) -> None:
    run = hoard("data.patients=true")
    assert not list(run.rglob("samples/*"))  # nor are they shown in the report
    problems = audit(run).problems
    assert len(problems) == 2
    assert all("kept/images.safetensors: raw patient data (exemplars" in p for p in problems)
    done = cli("audit", run)
    assert done.code == 1
    assert "audit failed: 2 problem(s)" in done.out


@pytest.mark.parametrize("patients", [True, False])
def test_exemplars_of_patients_are_raw_data(hoard: Callable[..., Path], patients: bool) -> None:
    replay = "method=star", "method.replay=exemplars", "method.exemplars.per_task=2"
    run = hoard(*replay, f"data.patients={str(patients).lower()}")
    problems = audit(run).problems
    raw = [problem for problem in problems if "raw patient data (exemplars" in problem]
    assert problems == raw and bool(raw) == patients


def test_exemplars_are_not_called_otherwise(hoard: Callable[..., Path], rewrite) -> None:
    run = hoard("method=finetune", "method.replay=exemplars", "method.exemplars.per_task=2")
    for path in run.rglob("ledger.json"):
        ledger = json.loads(path.read_text())
        for item in ledger["items"]:
            item["kind"] = "synthetic" if item["kind"] == "exemplars" else item["kind"]
        _write_ledger(path, ledger)
    rewrite(run)
    problems = audit(run).problems
    assert problems and all("is stored as exemplars and called synthetic" in problem for problem in problems)


def test_mark_of_patients_cannot_be_taken_off_in_the_ledger_alone(hoard: Callable[..., Path]) -> None:
    run = hoard("data.patients=true")
    for path in run.rglob("ledger.json"):
        path.write_text(path.read_text().replace('"patient_data": true', '"patient_data": false'))
    assert sum("raw patient data" in problem for problem in audit(run).problems) == 2


def test_samples_of_patients_in_the_report(hoard: Callable[..., Path]) -> None:
    run = hoard("data.patients=true", "method=finetune", "report.patient_samples=true")
    problems = audit(run).problems
    assert problems and all("raw patient data (preview" in p for p in problems)


def _turn_into_preview(run: Path, **changes: object) -> None:
    """Say of the statistics of the last task that they are a preview."""
    path = run / LAST / "ledger.json"
    ledger = json.loads(path.read_text())
    entry = next(i for i in ledger["items"] if i["name"] == "statistics")
    entry.update({"kind": "preview", "made_from": "drawn from statistics", **changes})
    _write_ledger(path, ledger)


def _of_patients(run: Path, pictures: bool = False) -> None:
    """Say everywhere that the run's images come from patients, and take the pictures of test images out of it."""
    described = json.loads((run / "stream.json").read_text()) | {"patients": True}
    (run / "stream.json").write_text(json.dumps(described, indent=1, ensure_ascii=False) + "\n")
    for path in run.rglob("ledger.json"):
        ledger = json.loads(path.read_text()) | {"patients": True}
        if not pictures:
            ledger["items"] = [i for i in ledger["items"] if "/samples/" not in i["files"][0]["file"]]
        _write_ledger(path, ledger)
    for path in () if pictures else list(run.rglob("samples")):
        shutil.rmtree(path)


def _write_ledger(path: Path, ledger: dict) -> None:
    """Write a ledger with the totals of its items."""
    totals: dict[str, int] = {}
    for item in ledger["items"]:
        totals[item["kind"]] = totals.get(item["kind"], 0) + item["bytes"]
    path.write_text(json.dumps(ledger | {"total_bytes": totals}, indent=1, ensure_ascii=False) + "\n")


def test_pictures_that_a_method_made_up_are_not_raw_data(run: Path, rewrite) -> None:
    _of_patients(run)
    _turn_into_preview(run)
    rewrite(run)
    assert audit(run).problems == []


def test_pictures_of_test_images_stay_raw_data_beside_them(run: Path, rewrite) -> None:
    _of_patients(run, pictures=True)
    _turn_into_preview(run)
    rewrite(run)
    problems = audit(run).problems
    assert len(problems) == len(list(run.rglob("samples/*.png")))
    assert all("samples/" in p and "raw patient data (preview" in p for p in problems)


@pytest.mark.parametrize("changes", [{"patient_data": True}, {"kind": "exemplars"}])
def test_what_says_it_is_raw_is_raw_wherever_it_lies(changes: dict[str, object], run: Path, rewrite) -> None:
    _of_patients(run)
    _turn_into_preview(run, **changes)
    rewrite(run)
    fails(run, f"{LAST}/kept/statistics.safetensors", "raw patient data")


@pytest.mark.parametrize(
    "place", ["samples/1.png", "samples/1.class.json", "kept/1.png", "1.safetensors", "kept/a/1.safetensors"]
)
def test_previews_elsewhere_are_raw(place: str) -> None:
    def listed(kind: str, *files: str) -> dict[str, object]:
        return {"kind": kind, "files": [{"file": file} for file in files]}

    made_up = "tasks/0/kept/1.safetensors", "kept/00-00-dream/000000.safetensors"
    assert is_raw(listed("preview", f"tasks/0/{place}"))
    assert is_raw(listed("preview", *made_up, f"tasks/0/{place}"))
    assert not is_raw(listed("statistics", f"tasks/0/{place}"))
    assert not is_raw(listed("preview", *made_up))


def test_run_that_kept_other_images(hoard: Callable[..., Path], cli) -> None:
    run = hoard()
    done = cli("audit", run)
    assert done.code == 0, done.out
    assert "exemplars" in done.out and "raw training samples (exemplars) are kept" in done.out
    found = json.loads(cli("audit", run, "--json").out)
    kept = [i for i in found["items"] if i["kind"] == "exemplars"]
    assert [i["bytes"] for i in kept] == [1 * 3 * 32 * 32 * 4, 2 * 3 * 32 * 32 * 4]
    assert found["bytes_by_kind"]["exemplars"] == 2 * 3 * 32 * 32 * 4


def test_run_under_way(run: Path, rewrite) -> None:
    (run / LAST / "done").unlink()
    rewrite(run)
    (run / "resume").mkdir()
    save_file({"x": torch.zeros(1)}, run / "resume/state.safetensors")
    (run / ".part-9.json").write_bytes(b"x")
    (run / LAST / "numbers.json").write_text('{"replayed": 3}\n')  # killed while the task was sealed
    with (run / "log.jsonl").open("a") as log:
        log.write('{"seconds": 9.0, "loss": 1.0}\n')
    found = audit(run)
    assert found.problems == []
    assert found.notes == ["the run is not finished: the state of the task under way is listed, but not looked into"]
    assert {i["task"] for i in found.items} == {"00-01-06", "01-07-08"}
    (run / "tasks/03-later").mkdir()
    (run / "tasks/03-later/image.png").write_bytes(b"x")  # only the task under way may hold what no ledger knows
    (run / "resume/photo.png").write_bytes(b"x")
    (run / LAST / "photo.png").write_bytes(b"x")
    assert sorted(p.partition(":")[0] for p in audit(run).problems) == sorted(
        ["tasks/03-later/image.png", "resume/photo.png", f"{LAST}/photo.png", "tasks/03-later"]
    )


def test_log_of_a_run_under_way_only_grows(run: Path, rewrite) -> None:
    (run / LAST / "done").unlink()
    rewrite(run)
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text.replace('"seconds": ', '"seconds":  ', 1) + text)
    fails(run, "log.jsonl", "its content is not what files.json says")


def test_log_is_listed_when_a_task_is_sealed(run: Path, rewrite) -> None:
    """A run that is stopped in its first task has one that nothing lists yet; what it holds is checked all the same."""
    rewrite(run)
    list_files(run, (), dropped=["log.jsonl"])
    fails(run, "log.jsonl", "files.json does not list it")
    (run / LAST / "done").unlink()
    rewrite(run)
    list_files(run, (), dropped=["log.jsonl"])
    assert audit(run).problems == []
    with (run / "log.jsonl").open("a") as log:
        log.write('{"seconds": 9.0, "event": "Jane Doe"}\n')
    assert [p.partition(":")[0] for p in audit(run).problems] == ["log.jsonl"]


def test_the_least_number_of_images_is_told_where_something_is_made_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    item = {"task": "00-a", "name": "means", "kind": "statistics", "bytes": 4, "per_class_bytes": 4, "tensors": []}
    item |= {"stored": [], "files": [], "made_from": "training images"}
    for images, told in ((None, False), (30, True)):
        found = Audit(min_images=20)
        found.items.append({**item, "from_images": images})  # type: ignore[typeddict-item]
        show(found, as_json=False)
        assert ("come from at least 20 images of each class" in capsys.readouterr().out) == told


def test_the_audit_knows_the_phases_of_all_methods() -> None:
    folder = Path(methods.__file__).parent
    named = re.compile(r'(?:Collect|Generate|_generate)\(\s*"([^"]+)"|\bname="([^"]+)"')
    found = {a or b for path in folder.rglob("*.py") for a, b in named.findall(path.read_text(encoding="utf-8"))}
    assert found == PHASES
