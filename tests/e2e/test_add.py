"""Data sets that arrive one after another: the whole stream at once and `run` + `add` + `add` are the same run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from perdure.adding import Addition, extended
from perdure.errors import DataError
from perdure.metrics.changes import read_changes
from perdure.metrics.confusion import read_counts
from perdure.metrics.figures import measured_tasks
from perdure.metrics.measured import class_values
from perdure.metrics.results import gather_results
from perdure.run_folder import RunFolder

pytestmark = pytest.mark.e2e

SHARED: dict[str, Any] = {
    "name": "sets",
    "network": {
        "backbone": "tiny_resnet",
        "tiny_channels": [4, 4, 4, 4],
        "output_stride": 4,
        "width": 8,
        "dilations": [1],
    },
    "augment": {"crop": 32},
    "evaluate": {"size": None},
    "method": "finetune",
    "training": {"steps": 3, "later_steps": 2, "batch_size": 2},
    "engine": {"device": "cpu", "threads": 1, "trackers": [], "save_seconds": 0},
    "report": {"samples": 1},
}
SETS = {"pets": ["cat", "dog"], "plants": ["tree"], "homes": ["house", "cat"]}


@pytest.fixture
def sets(world: Path) -> Path:
    """The photographs three times over, each with classes of its own, and recipes of all of them and of the first."""
    for name, classes in SETS.items():
        shutil.copytree("photos", name)
        known = [line for line in Path("photos/classes.txt").read_text().splitlines() if line.split()[1] in classes]
        ids = {int(line.split()[0]) for line in known}
        others = [f"{k} other{k}" for k in {1, 2, 3, 4} - ids]
        Path(name, "classes.txt").write_text("\n".join([*known, *others]) + "\n")
    tasks = [{"name": name, "data": {"name": "folders", "root": name}, "classes": c} for name, c in SETS.items()]
    for file, some in (("all.yaml", tasks), ("first.yaml", tasks[:1])):
        stream = {"kind": "data_sets", "tasks": some}
        Path(file).write_text(yaml.safe_dump({**SHARED, "stream": stream}), encoding="utf-8")
    return world


def add(cli: Callable[..., Any], name: str, *more: object) -> Any:
    """``perdure add`` of one of the sets to the run ``grown``."""
    return cli("add", "grown", "--data", name, "--classes", ",".join(SETS[name]), "--quiet", *more)


def learned(run: str | Path) -> dict[str, bytes]:
    """Everything that a run learned and measured, by place; not what holds times or the folder's name."""
    told = {"log.jsonl", "report.html", "MODEL_CARD.md", "files.json", ".lock"}
    return {
        path.relative_to(run).as_posix(): path.read_bytes()
        for path in sorted(Path(run).rglob("*"))
        if path.is_file() and path.name not in told
    }


def test_the_whole_stream_and_one_set_after_another_give_the_same_bytes(sets: Path, cli: Callable[..., Any]) -> None:
    assert cli("run", "all.yaml", "--out", "whole", "--quiet").code == 0
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    here = ("--earlier", "pets=pets")
    assert add(cli, "plants", *here).code == 0
    assert add(cli, "homes", "--same", "cat", *here, "--earlier", "plants=plants").code == 0
    assert learned("grown") == learned("whole")
    described = RunFolder(Path("grown")).stream()
    assert [task.new for task in described.tasks] == [(1, 2), (3,), (4,)]
    assert described.tasks[2].annotated == (1, 4)
    card = Path("whole/MODEL_CARD.md").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ") for line in card if line.endswith("| done |")]
    assert [row[-3] for row in rows] == ["3"] * 3, "test images of each task's own set"
    audited = cli("audit", "grown")
    assert audited.code == 0, audited.out


def test_earlier_data_is_not_needed(sets: Path, cli: Callable[..., Any]) -> None:
    """Without the earlier sets the same weights are learned; only what needs their test cases is missing."""
    assert cli("run", "all.yaml", "--out", "whole", "--quiet").code == 0
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    shutil.rmtree("pets")
    assert add(cli, "plants").code == 0
    shutil.rmtree("plants")
    done = cli("add", "grown", "--data", "homes", "--classes", "house,cat", "--same", "all")
    assert done.code == 0
    said = " ".join((done.out + done.err).split())
    assert "test cases of pets, plants are not at hand: what is forgotten of them is not measured" in said
    assert said.count("not at hand: ") == 1 and "give --earlier TASK=DIR with every `perdure add`" in said
    # what can be measured is told with its name, in the line, on the page and in the card
    run = RunFolder(Path("grown"))
    results = gather_results(run.stream(), run.sealed())
    (place, value), *others = measured_tasks(results, 2)
    assert (place, others) == (2, []) and value == results.task_dice.of(2, 2)
    lacking = "test cases of pets, plants not at hand"
    line = next(line for line in (done.out + done.err).splitlines() if line.startswith("sealed task 3 of 3"))
    assert line.endswith(f"  Dice of homes {value:.1f}  ({lacking})")
    page, card = (Path("grown", name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    tiles = page.partition('<div class="cards">')[2].partition("</section>")[0]
    assert "Dice of task homes" in tiles and f"{value:.1f}" in tiles and lacking in tiles and "–" not in tiles
    assert f"Dice of task homes: {value:.1f} % ({lacking})." in card
    assert cli("audit", "grown").code == 0
    for folder in ("00-pets", "01-plants", "02-homes"):
        ours, theirs = (load_file(Path(run, "tasks", folder, "weights.safetensors")) for run in ("grown", "whole"))
        assert ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)
    counted = json.loads(Path("grown/tasks/02-homes/counts.json").read_text())["sets"]
    assert list(counted) == ["homes"]
    found = read_changes(Path("grown"), RunFolder(Path("grown")).stream(), 2)
    assert found is not None and [c.before for c in found.classes] == [None] * 3
    assert all(c.agreement is not None for c in found.classes if c.fall is not None)
    shown = cli("predict", "grown", "-i", "homes/images", "-o", "masks")
    assert shown.code == 0, shown.err


CASES = {
    "a name that is taken": (("homes",), 2, "the model has learned cat from 'pets' already", "--same cat"),
    "a task name that is taken": (("plants", "--name", "pets"), 2, "the run has a task 'pets' already", "--name"),
    "a rename to a name that is taken": (
        ("plants", "--rename", "tree=cat"),
        2,
        "the model has learned cat from 'pets' already",
        "--rename tree=cat --same cat if it is the same structure, --rename tree=NAME if it is another one",
    ),
    "same of an unknown class": (("homes", "--same", "cow"), 2, "--same cow: the model knows no such class", "known"),
    "same of a class that is not here": (("plants", "--same", "dog"), 2, "the data set has no such class", ""),
    "earlier of an unknown task": (("plants", "--earlier", "zoo=pets"), 2, "the run has no task 'zoo'", "pets"),
    "a rename that is none": (("plants", "--rename", "tree"), 2, "--rename 'tree' cannot be read", "OLD=NEW"),
    "a rename to a path": (
        ("plants", "--rename", "tree=/home/joe/x"),
        2,
        "plants: the name '/home/joe/x' looks like a path",
        "another name",
    ),
    "a key that changes the method": (("plants", "training.lr=3"), 2, "'training.lr' cannot be changed", "data.KEY"),
    "a folder that is not there": (
        ("plants", "--earlier", "pets=nowhere"),
        2,
        "there is no such folder",
        "leave it out",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_before_anything_is_written(sets: Path, cli: Callable[..., Any], case: str) -> None:
    (name, *more), code, what, hint = CASES[case]
    if not Path(sets, "grown").exists():
        assert cli("run", "first.yaml", "--out", "grown", "--quiet", "training.steps=1").code == 0
    before = learned("grown")
    found = add(cli, name, *more)
    assert (found.code, what in found.err, hint in found.err) == (code, True, True), found.err
    assert len(found.err.strip().splitlines()) <= 2
    assert learned("grown") == before


def test_another_name_of_a_known_structure_is_joined(sets: Path, cli: Callable[..., Any]) -> None:
    assert cli("run", "first.yaml", "--out", "grown", "--quiet", "training.steps=1").code == 0
    joined = add(cli, "plants", "--rename", "tree=cat", "--same", "cat")
    assert joined.code == 0, joined.err
    task = RunFolder(Path("grown")).stream().tasks[1]
    assert (task.new, task.annotated) == ((), (1,))


def test_cases_that_return_are_held_against_their_last_figures(sets: Path, cli: Callable[..., Any]) -> None:
    """Pets are away while plants are learned, and back for homes: before is what was measured after pets."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    shutil.move("pets", "away")
    assert add(cli, "plants").code == 0
    counts = Path("grown/tasks/00-pets/counts.json")
    dice = class_values("dice", read_counts(counts)["pets"])
    words = ("--data", "homes", "--classes", "house,cat", "--same", "cat", "--earlier", "pets=away", "--at-most", "0")
    done = cli("add", "grown", *words)
    found = read_changes(Path("grown"), RunFolder(Path("grown")).stream(), 2)
    assert found is not None
    cat, dog, tree = found.classes
    for c in (cat, dog):
        assert c.before == dice[c.class_id].value and c.after is not None
        assert (c.since, c.fell_in) == (("pets",), "Dice since pets")
    assert (tree.before, tree.since) == (None, ())
    said = " ".join((done.out + done.err).split())
    assert "before of cat, dog: measured after pets" in said and "test cases of plants are not at hand" in said
    assert "measured after pets: its test images were not at hand" in Path("grown/report.html").read_text()
    deep = [c for c in found.classes if c.fall is not None and c.fall > 0]
    assert done.code == int(bool(deep))
    assert all(f"({c.fall:.1f} of {c.fell_in})" in said for c in deep)


def test_code_that_a_run_or_a_command_names_is_not_imported(
    sets: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies where Python would find it, and leaves a trace where it is imported."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet", "training.steps=1").code == 0
    monkeypatch.syspath_prepend(sets)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    Path("harmful.py").write_text("import pathlib\npathlib.Path('executed').touch()\n")
    whole = Path("grown/recipe.yaml").read_text()
    for key, more, place in (
        (None, ("data.name=harmful:open",), "--data plants"),
        ("method", (), "grown/recipe.yaml"),
        ("network", (), "grown/recipe.yaml"),
    ):
        named = yaml.safe_load(whole) | ({key: {"name": "harmful:open"}} if key else {})
        Path("grown/recipe.yaml").write_text(yaml.safe_dump(named))
        before = learned("grown")
        found = add(cli, "plants", *more)
        assert found.code == 2 and f"{place} names code outside of Perdure: 'harmful:open'" in found.err, found.err
        assert "--allow-code" in found.err and not Path("executed").exists() and learned("grown") == before
    allowed = add(cli, "plants", "--allow-code")
    assert allowed.code == 2 and Path("executed").exists()


def test_a_place_for_working_files_is_the_users_alone(sets: Path, cli: Callable[..., Any]) -> None:
    """Who made the run would find the next patients' images where the run folder says."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet", "training.steps=1").code == 0
    recipe = Path("grown/recipe.yaml")
    named = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(named | {"engine": {**named.get("engine", {}), "working": str(sets / "theirs")}}))
    run, plants = RunFolder(Path("grown")), Addition("plants", classes=SETS["plants"])
    assert run.recipe().engine.working == sets / "theirs"
    assert extended(run, plants).engine.working is None
    mine = replace(plants, overrides=("engine.working=mine",))
    assert extended(run, mine).engine.working == Path("mine")


def test_another_set_under_the_name_of_a_learned_one_is_told(sets: Path, cli: Callable[..., Any]) -> None:
    short = ("--out", "grown", "--quiet", "training.steps=1", "stream.tasks.1.classes=null")
    assert cli("run", "first.yaml", *short).code == 0
    before = learned("grown")
    for words, code, what, hint in (
        (
            ("--data", "plants", "--name", "pets"),
            2,
            "a task 'pets' already, and this data set",
            "--name NAME",
        ),
        (("--data", "pets", "--same", "cat"), 2, "--same cat: the model knows no such class", "leave it out"),
        (
            ("--data", "plants", "--earlier", "pets=plants", "--same", "all"),
            1,
            "the classes of the data set",
            "give the",
        ),
        (("--data", "pets", "--give-up"), 2, "--give-up takes no --data", "leave one of them out"),
        ((), 2, "add needs a data set", "give --data DIR"),
    ):
        found = cli("add", "grown", *words)
        assert (found.code, what in found.err, hint in found.err) == (code, True, True), found.err
        assert learned("grown") == before


def test_nothing_is_written_or_deleted_through_a_link(sets: Path, cli: Callable[..., Any]) -> None:
    """A run may come from somebody else, and its links lead wherever that one wanted."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet", "training.steps=1").code == 0
    Path("mine/deeper").mkdir(parents=True)
    Path("mine/deeper/thesis.txt").write_text("mine")
    commands = (
        ("add", "grown", "--data", "plants", "--classes", "tree", "--quiet"),
        ("add", "grown", "--give-up"),
        ("run", "first.yaml", "--out", "grown", "--resume", "--quiet", "training.steps=1"),
        ("report", "grown"),
    )
    shutil.copytree("grown/tasks", "mine", dirs_exist_ok=True)
    mine, before = learned("mine"), learned("grown")
    for place in ("working", "resume", "kept", "tracking", "tasks", "tasks/01-plants"):
        link, aside = Path("grown", place), Path("aside")
        if link.exists():
            link.rename(aside)
        link.symlink_to(Path("mine").absolute(), target_is_directory=True)
        for words in commands:
            found = cli(*words)
            assert found.code == 1 and f"grown/{place} is a link" in found.err, (words, found.err)
        link.unlink()
        if aside.exists():
            aside.rename(link)
        assert learned("mine") == mine and learned("grown") == before
    assert add(cli, "plants", "training.steps=1").code == 0


@pytest.mark.parametrize("place", ["perdure.before.Before.take", "perdure.working.WorkingFolder.fill"])
def test_data_that_proves_bad_later_leaves_no_trace(
    sets: Path, cli: Callable[..., Any], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description of the stream has grown by then, and results and pages with it."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet", "engine.trackers=[tensorboard]").code == 0
    before = {path: path.read_bytes() for path in Path("grown").rglob("*") if path.is_file()}

    def refuse(*_: object) -> None:
        assert len(RunFolder(Path("grown")).stream().tasks) == 2
        raise DataError("a case cannot be shown", "leave it out")

    monkeypatch.setattr(place, refuse)
    found = add(cli, "plants", "engine.trackers=[tensorboard]")
    assert found.code == 1 and "a case cannot be shown" in found.err
    assert {path: path.read_bytes() for path in Path("grown").rglob("*") if path.is_file()} == before
    audited = cli("audit", "grown")
    assert audited.code == 0, audited.out


def test_other_folders_and_runs_are_refused(sets: Path, cli: Callable[..., Any]) -> None:
    Path("empty").mkdir()
    assert cli("run", "photos.yaml", "--out", "steps", "--quiet").code == 0
    assert cli("run", "all.yaml", "method=joint", "--out", "joint", "--quiet").code == 0
    assert cli("run", "first.yaml", "--out", "grown", "--quiet", "training.steps=1").code == 0
    told = {
        ("steps", "plants"): "learned the classes of one data set in steps",
        ("joint", "plants"): "'joint' learns all data sets at once",
        ("grown", "empty"): "nothing in empty says what kind of data set it is",
        ("grown", "nowhere"): "nowhere does not exist",
        ("grown", "voc"): "the data set 'voc' needs a folder",
        ("nothing", "plants"): "is not a run folder",
    }
    for (run, data), what in told.items():
        found = cli("add", run, "--data", data)
        assert found.code in (1, 2) and what in found.err, (run, data, found.err)


def test_a_fall_is_an_error_only_where_it_is_too_deep(sets: Path, cli: Callable[..., Any]) -> None:
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    shutil.copytree("grown", "again")
    assert add(cli, "plants", "--earlier", "pets=pets", "--at-most", "100").code == 0
    found = read_changes(Path("grown"), RunFolder(Path("grown")).stream(), 1)
    assert found is not None
    falls = [c.fall for c in found.classes if c.fall is not None]
    shutil.rmtree("grown")
    shutil.move("again", "grown")
    deep = add(cli, "plants", "--earlier", "pets=pets", "--at-most", "0")
    assert deep.code == int(max(falls) > 0)
    if deep.code:
        assert "more than 0 points lost" in deep.err


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("at", ["begin", "train", "seal"])
def test_a_kill_while_adding_goes_on_to_the_same_bytes(sets: Path, cli: Callable[..., Any], at: str) -> None:
    """The same command again goes on; it is killed where the model is looked at, while training, and in sealing."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    shutil.copytree("grown", "quiet")
    place = {
        "begin": "perdure.before.Before.take",
        "train": "perdure.engine.trainer.Trainer.step",
        "seal": "perdure.sealing.write_ledger",
    }[at]
    module, _, name = place.rpartition(".")
    words = ["add", "grown", "--data", "plants", "--classes", "tree", "--quiet"]
    script = (
        "import os, pkgutil, signal\n"
        f"owner = pkgutil.resolve_name({module!r})\n"
        f"old = getattr(owner, {name!r})\n"
        "calls = []\n"
        "def kill(*a, **k):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == {2 if at == 'train' else 1}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return old(*a, **k)\n"
        f"setattr(owner, {name!r}, kill)\n"
        "from perdure.cli import _run\n"
        f"_run({words!r}, False)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ}, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert add(cli, "plants").code == 0
    again = cli("add", "quiet", "--data", "plants", "--classes", "tree", "--quiet")
    assert again.code == 0, again.err
    assert learned("grown") == learned("quiet")
    assert not Path("grown/working").exists()


def test_a_data_set_that_was_begun_can_be_taken_out(sets: Path, cli: Callable[..., Any]) -> None:
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    before = learned("grown")
    words = ["add", "grown", "--data", "plants", "--classes", "tree", "--quiet"]
    script = (
        "import os, signal\nfrom perdure.engine.trainer import Trainer\n"
        "Trainer.step = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"from perdure.cli import _run\n_run({words!r}, False)\n"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ}, check=False, capture_output=True)
    assert len(RunFolder(Path("grown")).stream().tasks) == 2
    other = cli("add", "grown", "--data", "homes", "--same", "cat", "--quiet")
    assert other.code == 1 and "--give-up" in other.err
    for place in ("kept/00-03-pairs", "kept/01-03-pairs"):  # as a method that generates items would have left them
        Path("grown", place).mkdir(parents=True)
        Path("grown", place, "000000.safetensors").write_bytes(b"pairs")
    done = cli("add", "grown", "--give-up")
    assert done.code == 0 and "'plants' was taken out" in done.err + done.out, done.err
    assert [folder.name for folder in Path("grown/kept").iterdir()] == ["00-03-pairs"]  # of what is sealed
    shutil.rmtree("grown/kept")
    assert learned("grown") == before
    audited = cli("audit", "grown")
    assert audited.code == 0, audited.out


def test_a_later_data_set_without_any_mask_is_refused_before_the_first_is_trained(
    sets: Path, cli: Callable[..., Any]
) -> None:
    for mask in Path("homes/masks").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
    found = "task 'homes': no training image shows a class that it annotates"
    done = cli("run", "all.yaml", "--out", "whole", "--quiet")
    assert done.code == 1 and found in done.err and not Path("whole").exists()
    checked = cli("check", "all.yaml")
    assert checked.code == 1 and found in " ".join(checked.out.split())


def test_other_test_cases_are_no_measure_of_forgetting(sets: Path, cli: Callable[..., Any]) -> None:
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    before = learned("grown")
    shutil.copytree("pets", "others")
    for name in ("p5", "p6", "p7"):  # the test cases
        shutil.copy(Path("pets", "masks", "p0.png"), Path("others", "masks", f"{name}.png"))
    found = add(cli, "plants", "--earlier", "pets=others")
    assert found.code == 1 and "the test cases of 'pets' are not those" in found.err
    assert learned("grown") == before


def test_working_files_elsewhere_are_not_forgotten(sets: Path, cli: Callable[..., Any]) -> None:
    """Killed when the first of them is there: the run says that there are some, and needs the place to go back."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    before = learned("grown")
    words = ["add", "grown", "--data", "plants", "--classes", "tree", "--quiet", "engine.working=fast"]
    script = (
        "import os, signal\nfrom perdure.before import Before\n"
        "keep = Before._keep\n"
        "Before._keep = lambda *a: (keep(*a), os.kill(os.getpid(), signal.SIGKILL))\n"
        f"from perdure.cli import _run\n_run({words!r}, False)\n"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ}, check=False, capture_output=True)
    assert [file.name for file in Path("fast").rglob("*.npz")] == ["00000.npz"]
    assert Path("grown/working/01-plants/elsewhere").is_file()
    lost = cli("add", "grown", "--give-up")
    assert lost.code == 1 and "engine.working" in lost.err
    done = cli("add", "grown", "--give-up", "engine.working=fast")
    assert done.code == 0, done.err
    assert learned("grown") == before and not list(Path("fast").rglob("*.npz"))


def test_two_at_once_on_one_run(sets: Path, cli: Callable[..., Any]) -> None:
    """While one command learns, others say so and change nothing, whatever they find in the folder at that moment."""
    assert cli("run", "first.yaml", "--out", "grown", "--quiet", "training.steps=1").code == 0
    words = ["add", "grown", "--data", "plants", "--classes", "tree", "--quiet"]
    script = (
        "import pathlib, sys, time\nfrom perdure.engine.trainer import Trainer\n"
        "Trainer.step = lambda *a: (pathlib.Path('learning').touch(), time.sleep(600))\n"
        f"from perdure.cli import _run\n_run({words!r}, False)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    try:
        while not Path("learning").exists():
            assert first.poll() is None, first.stderr.read().decode() if first.stderr else ""
            time.sleep(0.1)
        before = learned("grown")
        for others in (
            ("--data", "plants", "--classes", "tree"),
            ("--data", "homes", "--same", "cat"),
            ("--data", "pets", "--name", "more", "--same", "all"),
            ("--give-up",),
        ):
            done = cli("add", "grown", *others, "--quiet")
            told = done.err.splitlines()
            assert done.code == 1 and len(told) == 2, done.err
            assert "another command is working on the run folder grown" in told[0] and "wait until it ends" in told[1]
        assert learned("grown") == before
    finally:
        first.kill()
        first.communicate()


def test_a_copy_of_a_learned_set_is_told_and_a_name_is_not_changed_silently(
    sets: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.sealing.predict_cases", None)  # pictures show what was measured: nothing is predicted
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    assert list(Path("grown").rglob("*.pred.png"))
    before = learned("grown")
    elsewhere = cli("add", "grown", "--data", "plants", "--classes", "tree", "--name", "../plants")
    assert elsewhere.code == 2 and "--name ../plants" in elsewhere.err and "--name plants" in elsewhere.err
    assert learned("grown") == before
    shutil.copytree("pets", "copied")
    copied = cli("add", "grown", "--data", "copied", "--classes", "cat,dog", "--same", "all")
    assert copied.code == 0, copied.err
    assert "'copied' has the training images and labels of 'pets'" in " ".join((copied.out + copied.err).split())


def test_the_same_set_again_is_told(sets: Path, cli: Callable[..., Any]) -> None:
    assert cli("run", "first.yaml", "--out", "grown", "--quiet").code == 0
    assert add(cli, "plants").code == 0
    before = learned("grown")
    again = cli("add", "grown", "--data", "plants", "--classes", "tree")
    assert again.code == 0 and "'plants' was learned before" in again.err
    assert learned("grown") == before
