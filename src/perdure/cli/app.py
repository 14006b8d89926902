"""The verbs and their options. Each verb imports its work when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perdure import __version__

app = typer.Typer(
    name="perdure",
    help="Segmentation models that learn task after task without forgetting. "
    "Errors are plain lines; add --debug to any command for a traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
Json = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Run = Annotated[Path, typer.Argument(help="a run folder")]


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
    out: Annotated[Path, typer.Option("--out", help="folder for the runs")] = Path("demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="start again even if there is a demo already")] = False,
) -> None:
    """Learn digits task by task with STAR, fine-tuning and jointly, and compare: two to three minutes."""
    from perdure.cli import demo as verb

    verb.demo(out, fresh)


@app.command("list")
def list_things(
    what: Annotated[str, typer.Argument(help="recipes, methods, datasets, networks or metrics")],
    as_json: Json = False,
) -> None:
    """List what comes with the package."""
    from perdure.cli import listing as verb

    verb.list_things(what, as_json)


@app.command()
def check(
    what: Annotated[str, typer.Argument(help="a recipe (name or file), or the name of a data set")],
    path: Annotated[Path | None, typer.Argument(help="folder of the data set")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value; for a recipe or a data set's option")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a recipe (schema, data, images of each task) or a data set (layout, files, labels, counts)."""
    from perdure.cli import check as verb

    verb.check(what, path, overrides or [], as_json)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="name of a shipped recipe or a YAML file")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="values that replace the recipe's")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="run folder; default runs/RECIPE-METHOD")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a run that was stopped")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
) -> None:
    """Run an experiment: learn the tasks of a recipe one after another."""
    from perdure.cli import run as verb

    verb.run(recipe, overrides or [], out, resume, quiet)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    figure: Annotated[
        list[str] | None, typer.Option("--figure", help="figure names; default the headline figures")
    ] = None,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option("--html", help="write one page that puts the runs side by side")] = None,
) -> None:
    """Put runs of one stream side by side."""
    from perdure.cli import results as verb

    verb.compare(runs, figure, as_json, html)


@app.command()
def report(run: Run) -> None:
    """Write report.html and MODEL_CARD.md of a run again."""
    from perdure.cli import results as verb

    verb.report(run)


@app.command()
def predict(
    run: Run,
    inputs: Annotated[
        list[Path], typer.Option("-i", "--input", help="image file or folder; may be given several times")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for the masks or the table")],
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda")] = "auto",
) -> None:
    """Apply a run's newest sealed model to new images: masks and the class list, or a table of classes."""
    from perdure.cli import predict as verb

    verb.predict(run, inputs, out, device)


@app.command()
def audit(run: Run, as_json: Json = False) -> None:
    """List every byte a run keeps and look for patient data, unknown files, names and paths; exit 1 if any."""
    from perdure.cli import audit as verb

    verb.audit_run(run, as_json)
