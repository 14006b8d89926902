"""What the verbs print, and how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perdure import __version__
from perdure.config.load import shipped
from perdure.metrics.definitions import describe

pytestmark = pytest.mark.e2e
VERBS = ("demo", "list", "check", "run", "compare", "report", "predict", "phantoms", "audit")
LISTS = ("recipes", "methods", "datasets", "networks", "metrics")
HEAVY = {"torch", "torchvision", "timm", "accelerate", "matplotlib", "sklearn", "safetensors"}
ASK = """
import contextlib, io, json, resource, sys
sys.argv = ["perdure", *sys.argv[1:]]
from perdure.cli import main
out = io.StringIO()
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
    main()
print(json.dumps([sorted(m for m in sys.modules if "." not in m), out.getvalue()]))
"""


def perdure(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "perdure", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "words", ["", "--help", "--version", *(f"{v} --help" for v in VERBS), *(f"list {n}" for n in LISTS)]
)
def test_help_and_lists_import_nothing_heavy(words: str) -> None:
    done = subprocess.run([sys.executable, "-c", ASK, *words.split()], capture_output=True, text=True, check=True)
    modules, out = json.loads(done.stdout)
    assert not HEAVY & set(modules)
    assert len(out.split()) >= 2


def test_help_names_every_verb_and_what_it_does(cli) -> None:
    done = cli("--help")
    assert (done.code, done.err) == (0, "")
    for verb in VERBS:
        line = next(line for line in done.out.splitlines() if line.split()[:1] == [verb])
        assert len(line.split()) > 5
    assert "--debug" in done.out


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_explains_every_option(verb: str, cli) -> None:
    done = cli(verb, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Usage: ")
    tail = done.out[done.out.index("Options:") :].splitlines()[1:]
    options = [line.split() for line in tail if line.strip().startswith("-")]
    assert options and all(len(words) > 2 or words[-1].startswith("--") for words in options)


def test_no_verb_shows_the_help_and_is_wrong_usage(cli) -> None:
    assert cli().code == 2
    assert cli().out == cli("--help").out


def test_version(cli) -> None:
    assert cli("--version") == (0, f"perdure {__version__}\n", "")


@pytest.mark.parametrize("name", LISTS)
def test_lists(name: str, cli) -> None:
    done = cli("list", name, "--json")
    rows = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert len(rows) >= 2 and all(row.keys() == rows[0].keys() for row in rows)
    shown = cli("list", name)
    assert shown.code == 0
    assert all(next(iter(row.values())) in shown.out for row in rows)


def test_list_of_recipes_holds_every_shipped_one(cli) -> None:
    assert [row["recipe"] for row in json.loads(cli("list", "recipes", "--json").out)] == list(shipped())


@pytest.mark.parametrize("columns", [None, "80"])
def test_nothing_is_cut_where_the_output_is_no_terminal(
    columns: str | None, cli, world: Path, star_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole figure names, meanings, hints and origins, each in one line, whatever rich takes for the width."""
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    long = "a_recipe_with_quite_a_long_name_" * 3
    Path("long.yaml").write_text(Path("tiny.yaml").read_text().replace("name: tiny", f"name: {long}"))
    copies = [shutil.copytree(star_run, f"{name}_{'x' * 60}") for name in ("one", "two")]
    ledger = json.loads(next(star_run.glob("tasks/00*/ledger.json")).read_text())
    said = {
        "list metrics": [row["meaning"] for row in describe()],
        "check long.yaml": [long],
        f"compare {' '.join(map(str, copies))}": ["miou.all[bg=in,absent=skip] ↑"],
        "audit run": [item["made_from"] for item in ledger["items"] if item["tensors"]],
    }
    shutil.copytree(star_run, "run", dirs_exist_ok=True)
    for words, wanted in said.items():
        done = cli(*words.split())
        assert done.code == 0, done.err
        assert "…" not in done.out.replace(str(world), "")
        whole = "".join(done.out.split())  # a title may be folded to the width of its table
        assert all("".join(text.split()) in whole for text in wanted), words


def test_debug_shows_where_with_the_same_exit_code(cli, world: Path) -> None:
    plain, debug = cli("run", "nothing"), cli("--debug", "run", "nothing")
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.err
    assert "Traceback" in debug.err and "load.py" in debug.err
    assert debug.err.endswith(plain.err)
    assert "Traceback" not in cli("runn", "--debug").err  # wrong words are no matter of where


def test_what_nobody_foresaw_is_called_a_bug(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("x\ny")

    monkeypatch.setattr("perdure.cli.listing.list_things", broken)
    done = cli("list", "recipes")
    assert done.code == 1
    assert done.err == "error: unexpected KeyError: 'x\\ny'\n       this is a bug; --debug shows where\n"


def test_output_into_a_closed_pipe_is_no_error() -> None:
    words = f"{sys.executable} -m perdure list metrics | head -c 1"
    done = subprocess.run(words, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_exit_codes_of_real_processes(world: Path) -> None:
    wrong = perdure("run", "tiny.yaml", "training.epochs=-1", "--out", "out")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: recipe 'tiny.yaml': training.epochs")
    failed = perdure("run", "photos.yaml", "data.root=nowhere", "--out", "out")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: the folder nowhere does not exist")
    assert perdure("list", "networks").returncode == 0
    assert not Path("out").exists()


def test_check_a_data_set(cli, world: Path) -> None:
    good = cli("check", "folders", "photos")
    assert (good.code, good.err) == (0, "")
    assert "everything can be used" in good.out and "house" in good.out
    found = json.loads(cli("check", "folders", "photos", "--json").out)
    assert found["ok"] and found["splits"]["train"]["samples"] == 5 and found["splits"]["test"]["images"]["4"] == 3


def test_check_a_data_set_that_is_damaged(cli, world: Path) -> None:
    Path("photos/images/p2.png").write_bytes(b"x")
    Image.fromarray(np.full((36, 40), 9, np.uint8)).save("photos/masks/p6.png")
    done = cli("check", "folders", "photos")
    assert (done.code, done.err) == (1, "")
    assert "train p2: photos/images/p2.png is not a readable image" in done.out
    assert "test p6: photos/masks/p6.png has label 9" in done.out and "not usable as it is" in done.out
    assert not json.loads(cli("check", "folders", "photos", "--json").out)["ok"]


@pytest.mark.parametrize("method", ["finetune", "joint", "star"])
def test_check_a_recipe(method: str, cli, world: Path) -> None:
    done = cli("check", "photos.yaml", f"method={method}")
    assert done.code == 0, done.out + done.err
    assert "the recipe can run" in done.out
    tasks = json.loads(cli("check", "photos.yaml", f"method={method}", "--json").out)["tasks"]
    assert [t["new"] for t in tasks] == (
        [["cat", "dog", "tree", "house"]] if method == "joint" else [["cat", "dog"], ["tree"], ["house"]]
    )


def voc(folder: Path, classes: int) -> None:
    """Data in the layout of VOC, one image a class; with 20 classes it passes for VOC itself."""
    names = [f"i{k}" for k in range(1, classes + 1)]
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for k, name in enumerate(names, 1):
        Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(folder / f"JPEGImages/{name}.jpg")
        Image.fromarray(np.full((8, 8), k, np.uint8)).save(folder / f"SegmentationClass/{name}.png")
    for split in ("train_aug", "val"):
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
    if classes != 20:
        (folder / "classes.txt").write_text("\n".join(f"{k} kind {k}" for k in range(1, classes + 1)))


@pytest.mark.parametrize("method", ["star", "joint"])
def test_check_compares_with_the_published_counts_of_the_published_data(method: str, cli, world: Path) -> None:
    small = ("network.backbone=tiny_resnet", "network.weights=random", "network.width=8")
    words = ["check", "star/voc-15-1-overlap", "--json"]
    words += [*small, f"method={method}"]
    voc(world / "voc", 20)
    done = cli(*words, "data.root=voc")
    assert done.out, done.err
    rows = json.loads(done.out)["published"]
    assert done.code == 1  # other images than the published ones
    assert [r["ours"] for r in rows if r["split"] == "train"] == [15, 1, 1, 1, 1, 1]
    assert [r["published"] for r in rows if r["split"] == "train"] == [9568, 487, 299, 491, 500, 548]
    assert not any(r["ok"] for r in rows)

    voc(world / "other", 21)
    done = cli(*words, "data.root=other")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["published"] == []


def test_report_and_compare(cli, world: Path, star_run: Path) -> None:
    shutil.copytree(star_run, "run")
    page, card = Path("run/report.html"), Path("run/MODEL_CARD.md")
    before = page.read_bytes()
    page.unlink()
    card.unlink()
    done = cli("report", "run")
    assert (done.code, done.out, done.err) == (0, "", "report: run/report.html\n")
    assert page.read_bytes() == before and card.exists()
    done = cli("compare", "run", star_run, "--json", "--html", "page.html", "--figure", "miou.all", "--figure", "hiou")
    assert done.code == 0, done.err
    assert [name.partition("[")[0] for name in json.loads(done.out)["figures"]] == ["miou.all", "hiou"]
    assert Path("page.html").read_text().startswith("<!DOCTYPE html>")


def test_run_says_where_the_report_is_and_resume_of_a_finished_run_changes_nothing(
    cli, world: Path, star_run: Path
) -> None:
    shutil.copytree(star_run, "run")
    before = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file() and p.name != "log.jsonl"}
    done = cli("run", "tiny.yaml", "--out", "run", "--resume")
    assert done.code == 0, done.err
    assert done.out == ""
    assert done.err.splitlines() == ["tiny · star -> run", "report: run/report.html"]
    after = {p: p.read_bytes() for p in Path("run").rglob("*") if p.is_file() and p.name != "log.jsonl"}
    assert {p: c for p, c in after.items() if "tracking" not in p.parts} == {
        p: c for p, c in before.items() if "tracking" not in p.parts
    }


def test_a_folder_of_nobody_is_refused_and_not_made(cli, world: Path) -> None:
    done = cli("run", "tiny.yaml", "--out", "~nosuchuser/run")
    assert (done.code, done.err) == (
        2,
        "error: ~nosuchuser/run: there is no home folder of '~nosuchuser'\n       write the whole path\n",
    )
    assert not Path("~nosuchuser").exists()


@pytest.mark.parametrize(
    ("words", "recipe", "folders"),
    [
        ([], "demo", ["demo/finetune", "demo/star", "demo/joint"]),
        (["--volumes"], "demo-volumes", ["demo-volumes/finetune", "demo-volumes/lwf"]),
        (["--volumes", "--out", "x"], "demo-volumes", ["x/finetune", "x/lwf"]),
    ],
)
def test_demos_run_their_recipe_with_each_method(
    words: list[str], recipe: str, folders: list[str], cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran: list[tuple[str, str, str]] = []

    def run(given, folder: Path, resume: bool) -> None:
        assert resume
        ran.append((given.name, given.method.name, str(folder)))

    class Compared:
        def to_json(self) -> dict[str, str]:
            return {}

    monkeypatch.setattr("perdure.experiment.run_experiment", run)
    monkeypatch.setattr("perdure.report.compare_page.write_comparison", lambda runs, page: Compared())
    monkeypatch.setattr("perdure.report.compare.comparison_table", lambda comparison: "")
    done = cli("demo", *words)
    assert done.code == 0, done.err
    assert ran == [(recipe, folder.rpartition("/")[2], folder) for folder in folders]
    assert f"{folders[1]}/report.html" in done.err
