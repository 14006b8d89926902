"""The verbs and their options. Each verb imports its work when it is called.

The tables of ``list``, ``check`` and ``audit`` have a file each beside this one.
"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Final

import typer

from perdure import __version__
from perdure.cli import complete
from perdure.errors import Interrupted, RunError, UsageError, nearest, plain, stoppable
from perdure.files import home
from perdure.foreign import search_here


def _folder(text: str | Path) -> Path:
    """A folder to write to: a shell that knows no such user leaves ``~user`` as it is."""
    return home(Path(text))


app = typer.Typer(
    name="perdure",
    help="Segmentation and classification models that learn task after task without forgetting. "
    "Errors are plain lines; add --debug to any command for a traceback.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
AGAIN: Final = "the same command begins anew"
"""What to do after Ctrl-C in a command that saves nothing on its way."""
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Run = Annotated[Path, typer.Argument(help="a run folder")]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        help="import code outside of Perdure that the recipe names (method, network, reader of data), also from the "
        "current folder",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="values that replace the recipe's", autocompletion=complete.overrides
    ),
]


def _say(text: str) -> None:
    """A line for people: on the error stream, so that the output holds results only."""
    from rich.console import Console

    Console(stderr=True).print(plain(text), highlight=False, markup=False, soft_wrap=True)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"perdure {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="show the version")
    ] = False,
) -> None:
    """Hold the options of the program itself."""
    del version


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("--out", parser=_folder, help="folder for the runs; default demo or demo-volumes")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start again even if there is a demo already")] = False,
    volumes: Annotated[
        bool, typer.Option("--volumes", help="three partly labelled sets of built-in torso CT in 3D, with lwf")
    ] = False,
) -> None:
    """Learn digits task by task with STAR, fine-tuning and jointly, and compare: three to six minutes."""
    from perdure.cli.demo import demo as show

    _say(show(out, fresh, volumes))


@app.command("list")
def list_things(
    what: Annotated[
        str,
        typer.Argument(help="recipes, methods, datasets, networks or metrics", autocompletion=complete.lists),
    ],
    as_json: Json = False,
) -> None:
    """List what comes with the package."""
    from perdure.cli import listing

    listing.list_things(what, as_json)


@app.command()
def check(
    what: Annotated[
        str,
        typer.Argument(
            help="a recipe (name or file), or a data set (name, or package.module:function); neither is needed with "
            "--data",
            autocompletion=complete.recipes_and_data,
        ),
    ] = "",
    path: Annotated[
        str | None, typer.Argument(help="folder of the data set", autocompletion=complete.overrides)
    ] = None,
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            help="folder of a data set, whose reader is found from its files; with a recipe of data sets: in the place "
            "of its own, repeatable",
        ),
    ] = None,
    fix: Annotated[
        Path | None,
        typer.Option(
            "--fix",
            parser=_folder,
            help="only write corrected masks of a data set of volumes to this new folder: on the grid of their images, "
            "in whole numbers",
        ),
    ] = None,
    as_json: Json = False,
    allow_code: AllowCode = False,
) -> None:
    """Check a recipe (schema, images of each task, every file) or a data set (layout, files, labels, counts)."""
    from perdure.cli.check import check as look

    if allow_code:
        search_here()
    # what a shell hands over as WHAT and PATH are overrides where --data takes their place
    words = [word for word in (what, path, *(overrides or ())) if word]
    named = list(takewhile(lambda word: not complete.is_override(word), words[:2]))
    with stoppable("files were read" if fix is None else f"masks were written to {fix}", AGAIN):
        passed = look(named, data or (), words[len(named) :], fix, as_json, allow_code)
    if not passed:
        raise typer.Exit(1)


@app.command()
def run(
    recipe: Annotated[
        str, typer.Argument(help="name of a shipped recipe or a YAML file", autocompletion=complete.recipes)
    ],
    overrides: Overrides = None,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="for recipes of data sets: folder of one, in the place of its own; repeatable"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", parser=_folder, help="run folder; default runs/RECIPE-METHOD")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
    allow_code: AllowCode = False,
) -> None:
    """Run an experiment: learn the tasks of a recipe one after another."""
    from perdure.config.load import load_recipe, refuse_foreign_code

    # a wrong recipe is told before torch is imported, which takes seconds
    if data:
        from perdure.adding import begun

        loaded = begun(recipe, data, overrides or [])
    else:
        loaded = load_recipe(recipe, overrides or [])
    if allow_code:
        search_here()
    else:
        refuse_foreign_code(loaded, f"recipe '{recipe}'")
    folder = out or Path("runs") / f"{loaded.name.replace('/', '-')}-{loaded.method.name.rpartition(':')[2]}"

    from perdure.experiment import run_experiment

    try:
        run_experiment(loaded, folder, resume, quiet)
    except Interrupted as stop:
        if resume:
            raise
        raise Interrupted(stop.what, "the same command with --resume goes on from here") from stop
    if not quiet:
        _say(f"report: {folder / 'report.html'}")


@app.command()
def add(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="options of the data set as data.KEY=VALUE, of the machine as engine.KEY=VALUE",
            autocompletion=complete.overrides,
        ),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="folder of the new data set, in a layout of `perdure list datasets`")
    ] = "",
    name: Annotated[str, typer.Option("--name", help="name of the task; default: that of the folder")] = "",
    classes: Annotated[
        list[str] | None, typer.Option("--classes", help="classes that it annotates, with commas; default all")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option("--rename", metavar="OLD=NEW", help="name of a class in the model, with commas"),
    ] = None,
    same: Annotated[
        list[str] | None, typer.Option("--same", help="a class that the model knows is the same structure; all of them")
    ] = None,
    earlier: Annotated[
        list[str] | None,
        typer.Option("--earlier", metavar="TASK=DIR", help="folder of an earlier data set, to measure on its tests"),
    ] = None,
    at_most: Annotated[
        float | None,
        typer.Option("--at-most", min=0, help="points that an earlier class may lose, or exit code 1"),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars and no table")] = False,
    undo: Annotated[
        bool, typer.Option("--give-up", help="take a data set that was begun and not learned out of the run again")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Learn one more data set with a finished run, without data of earlier ones; goes on where it was stopped."""
    if allow_code:
        search_here()
    if undo and data:
        raise UsageError("--give-up takes no --data", "leave one of them out")
    if not (undo or data):
        raise UsageError("add needs a data set", "give --data DIR")
    from perdure.adding import Addition
    from perdure.cli.add import add as learn
    from perdure.cli.add import pairs, undone

    if undo:
        _say(undone(run, overrides or ()))
        return

    chosen, renamed = ([p.strip() for t in texts or () for p in t.split(",")] for texts in (classes, rename))
    if "" in chosen:
        raise UsageError("--classes names an empty class", "leave it out to learn all classes of the data set")
    folders = {task: Path(place) for task, place in pairs(earlier or [], "--earlier", "TASK=DIR").items()}
    names = pairs(renamed, "--rename", "OLD=NEW")
    addition = Addition(data, name, chosen, names, same or (), folders, overrides or ())
    fallen = learn(run, addition, at_most, quiet, allow_code)
    if fallen:
        raise RunError(
            f"more than {at_most:g} points lost: {', '.join(fallen)}",
            "the task is sealed all the same; a copy of the folder from before it still has the old model",
        )
    if not quiet:
        _say(f"report: {run / 'report.html'}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    figure: Annotated[
        list[str] | None,
        typer.Option("--figure", help="figure names; default the headline figures", autocompletion=complete.figures),
    ] = None,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option("--html", help="write one page that puts the runs side by side")] = None,
) -> None:
    """Put runs of one stream side by side."""
    from perdure.cli.console import open_console
    from perdure.report.compare import compare as put_side_by_side
    from perdure.report.compare import comparison_table
    from perdure.report.compare_page import write_comparison
    from perdure.run_folder import RunFolder

    for path in runs:
        RunFolder.existing(path)
    comparison = put_side_by_side(runs, figure) if html is None else write_comparison(runs, html, figure)
    if as_json:
        open_console().print_json(json.dumps(comparison.to_json()))
    else:
        open_console().print(comparison_table(comparison))
    if html is not None:
        _say(f"page: {html}")


@app.command()
def report(run: Run) -> None:
    """Write report.html and MODEL_CARD.md of a run again."""
    from perdure.kept.manifest import MANIFEST
    from perdure.report.page import write_model_card, write_report
    from perdure.run_folder import RunFolder

    folder = RunFolder.existing(run)
    with folder.locked():
        card, page = write_model_card(folder.path), write_report(folder.path)
        if (folder.path / MANIFEST).exists():
            folder.list_files((card.name, page.name))
    _say(f"report: {page}")


@app.command()
def predict(
    run: Run,
    inputs: Annotated[
        list[Path], typer.Option("-i", "--input", help="image, volume or folder; may be given several times")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", parser=_folder, help="folder for the label maps or the table")],
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
    task: Annotated[
        str, typer.Option("--task", help="show images as those of this task (name or number); default: the newest")
    ] = "",
    classes: Annotated[
        str,
        typer.Option(
            "--classes", help="further classes by name, separated by commas, of a method that reads names (clip_ciss)"
        ),
    ] = "",
    allow_code: AllowCode = False,
) -> None:
    """Apply a run's newest sealed model to new images or volumes: label maps and the class list, or a table."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"there is no device '{device}'", nearest(device, ("auto", "cpu", "cuda")))
    from rich.console import Console
    from rich.progress import Progress

    from perdure.predict import Trained, cases_of_run, classify_images, predict_files

    if allow_code:
        search_here()
    cases = cases_of_run(run, inputs, task)  # wrong inputs are told before the model is loaded
    with stoppable("the model was loaded", AGAIN):
        names = [name.strip() for name in classes.split(",") if name.strip()]
        model = Trained.open(run, device, allow_code, task, names)
    if model.note:
        _say(f"note: {model.note}")
    console = Console(stderr=True)
    kind = "volume" if all(case.ending for case in cases) else "image"
    work = predict_files if model.kind == "segmentation" else classify_images
    with (
        stoppable(f"{kind}s were labelled; whatever is in {out} is whole", AGAIN),
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
    ):
        shown = bar.add_task(f"{kind}s", total=len(cases))
        work(model, inputs, out, lambda done, _: bar.update(shown, completed=done))
    done, where = ("segmented", out) if model.kind == "segmentation" else ("classified", out / "predictions.csv")
    count = len(model.seen)
    _say(f"{len(cases)} {kind}(s) {done} into {count} {'class' if count == 1 else 'classes'} -> {where}")


@app.command()
def phantoms(
    what: Annotated[
        str,
        typer.Argument(
            help="torso (CT in 3D, three partly labelled sets) or slices (heart, eye and prostate in 2D)",
            autocompletion=complete.phantoms,
        ),
    ],
    folder: Annotated[Path, typer.Argument(parser=_folder, help="folder to write the data sets into")],
    train: Annotated[int | None, typer.Option("--train", help="training cases; default 24 volumes, 120 slices")] = None,
    test: Annotated[int | None, typer.Option("--test", help="test cases; default 8 volumes, 40 slices")] = None,
    size: Annotated[int, typer.Option("--size", help="height and width in pixels")] = 64,
    source: Annotated[int, typer.Option("--source", help="another number is another scanner with other patients")] = 0,
    seed: Annotated[int, typer.Option("--seed", help="another number gives other patients")] = 0,
) -> None:
    """Write built-in look-alikes of medical images as nnU-Net raw folders, one per data set."""
    from perdure.cli.phantoms import write

    options = {"train": train, "test": test, "size": size, "source": source, "seed": seed}
    for path in write(what, folder, options):
        _say(f"written: {path}")


@app.command()
def audit(
    run: Run,
    as_json: Json = False,
    key: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="sign the run with a private ed25519 key if it passes")
    ] = None,
    public: Annotated[
        Path | None, typer.Option("--verify", metavar="KEY", help="check the run's signature with this public key")
    ] = None,
) -> None:
    """List every byte a run keeps and look for patient data, unknown files, names and paths; exit 1 if any."""
    from perdure.audit.audit import audit as look
    from perdure.audit.signature import private_key, sign
    from perdure.cli.audit import show

    if key is not None and public is not None:
        raise UsageError("--sign and --verify exclude each other", "sign first, then verify with the public key")
    if key is not None:
        private_key(key)  # a wrong one is told before minutes of hashing
    found = look(run, public)
    show(found, as_json)
    if not found.passed:
        if key is not None:
            _say("not signed: the audit failed")
        raise typer.Exit(1)
    if key is not None:
        _say(f"signed: {sign(run, key)}")
