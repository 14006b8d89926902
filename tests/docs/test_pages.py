"""README and docs: commands parse, recipes and keys exist, links lead somewhere, numbers have a source."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import typer.main

from perdure.cli.app import app
from perdure.config.build import check_method
from perdure.config.load import load_recipe, shipped
from perdure.config.recipe import Recipe
from perdure.data.catalog import DATASETS
from perdure.errors import UsageError
from perdure.metrics.definitions import figure

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
VERBS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
NOT_YET = {"add", "export"}
LAUNCHERS = (
    re.compile(r"(?:\.venv/bin/)?perdure\s+"),
    re.compile(r"python -m perdure\s+"),
    re.compile(r"accelerate launch (?:--\w+ \S+ )*-m perdure\s+"),
)
OTHER = re.compile(
    r"make \w+$|python scripts/\w+\.py |\. \.venv/bin/activate$|python -m pip install |tensorboard --logdir |rm -r d/"
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(language: str) -> list[Block]:
    found = [Block(name(p), *match.groups()) for p in PAGES for match in FENCE.finditer(p.read_text(encoding="utf-8"))]
    return [block for block in found if block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def codes(page: Path) -> list[str]:
    """Code within the text of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


OF_THE_PROGRAM = ("--install-completion", "--version")


def shell_lines() -> list[tuple[str, str]]:
    lines = [(block.page, line.strip()) for block in blocks("sh") for line in block.text.splitlines() if line.strip()]
    for recipe in EXAMPLES:
        header = re.findall(r"^# +(perdure .+)$", recipe.read_text(encoding="utf-8"), re.MULTILINE)
        lines += [(name(recipe), line) for line in header]
    return lines


def words(line: str) -> list[str] | None:
    """What follows `perdure` in a shell line; None for other commands."""
    launcher = next((match for pattern in LAUNCHERS if (match := pattern.match(line))), None)
    return shlex.split(line[launcher.end() :], comments=True) if launcher else None


COMMANDS = [
    pytest.param(found, id=f"{page}: {line[:70]}")
    for page, line in shell_lines()
    if (found := words(line)) and found[0] not in OF_THE_PROGRAM
]


def parse(found: list[str]) -> dict[str, Any]:
    """Arguments of a verb as its own parser reads them; nothing is run."""
    verb, *rest = found
    return dict(VERBS[verb].make_context(verb, rest).params)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 30
    assert {found.values[0][0] for found in COMMANDS} == set(VERBS), "each verb is shown somewhere"


@pytest.mark.parametrize("found", COMMANDS)
def test_command_parses(found: list[str], at_root: Path) -> None:
    given = parse(found)
    verb = found[0]
    if verb == "run":
        check_method(load_recipe(given["recipe"], given["overrides"]))
    if verb == "check" and given["what"] and given["what"] not in DATASETS and ":" not in given["what"]:
        first = [given["path"]] if "=" in (given["path"] or "") else []  # a folder, or already a key=value
        load_recipe(given["what"], [*first, *(given["overrides"] or [])])
    for text in given.get("figure") or []:
        assert str(figure(text)).startswith(text.partition("[")[0])
    if verb == "list":
        assert given["what"] in ("recipes", "methods", "datasets", "networks", "metrics")


@pytest.mark.parametrize(
    ("page", "line"), [pytest.param(*found, id=f"{found[0]}: {found[1][:70]}") for found in shell_lines()]
)
def test_no_unknown_command(page: str, line: str) -> None:
    assert words(line) or OTHER.match(re.sub(r"\s+#.*", "", line)), f"{page}: what is '{line}'?"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    asked = set(re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE))
    assert {"demo", "test"} <= asked <= targets


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_the_text(page: Path, at_root: Path) -> None:
    for code in codes(page):
        if not (found := words(code + " ")) or found[0] in OF_THE_PROGRAM:
            continue
        verb, *rest = found
        assert verb in {
            *VERBS,
            "VERB",
            *(NOT_YET if "Planned" in prose(page) else ()),
        }
        if rest and verb in VERBS:
            parse(found)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_recipes_and_keys_exist(page: Path) -> None:
    for code in codes(page):
        if re.fullmatch(r"(star|clip-ciss|ccsi|cgr|clnet|data-sets)/[\w-]+", code):
            assert code in shipped(), f"{code} is no recipe"
        key = re.fullmatch(
            r"(data|stream|network|augment|volumes|evaluate|method|training|engine|report)\.(\w+)(=.*)?", code
        )
        if key is None or code.endswith((".md", ".html", ".csv", ".json", ".yaml", ".jsonl", ".png")):
            continue
        known = known_keys(key[1])
        assert key[2] in known, f"{code}: {key[1]} has no key {key[2]}, only {sorted(known)}"
        if key[3]:
            recipes = ("demo", "ccsi/digits", "clip-ciss/digits", "data-sets/torso")
            assert any(loads(recipe, code) for recipe in recipes), code


def loads(recipe: str, override: str) -> bool:
    """Whether a recipe can be changed like this."""
    try:
        check_method(load_recipe(recipe, [override]))
    except UsageError:
        return False
    return True


def known_keys(section: str) -> set[str]:
    """Keys of a section of recipes, and the further ones of what the section may name."""
    field = Recipe.model_fields[section].annotation
    kinds = [kind for kind in (field, *get_args(field)) if hasattr(kind, "model_fields")]  # a stream is of two kinds
    keys = {key for kind in kinds for key in kind.model_fields}
    reference = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    for part in re.findall(rf"^## `{section}: .*?(?=^## |\Z)", reference, re.DOTALL | re.MULTILINE):
        keys |= set(re.findall(r"^\| `(\w+)`", part, re.MULTILINE))
    return keys


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for image, target in re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", prose(page)):
        assert not (image and "//" in target), f"a picture comes from elsewhere: {target}"
        assert "//" not in target, f"{target} needs a network; the docs stand alone"
        file, _, anchor = target.partition("#")
        where = (page.parent / file).resolve() if file else page
        assert where.exists(), f"{name(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(where), f"{name(page)}: no heading #{anchor} in {where.name}"


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_of_the_source_exist(page: Path) -> None:
    for code in codes(page):
        if re.fullmatch(r"(src|scripts|examples|tests|docs|benchmarks)/[\w./-]+", code):
            assert (ROOT / code).exists(), f"{name(page)} names {code}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_name_no_machine(page: Path) -> None:
    assert not re.search(r"(?<![\w.])/(home|work|tmp|root|Users|mnt)/", page.read_text(encoding="utf-8"))


def test_every_page_can_be_reached_from_the_readme() -> None:
    todo, reached = [ROOT / "README.md"], set()
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md" or not page.is_file():
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)#\s]+)", prose(page))
        todo += [(page.parent / link).resolve() for link in links]
    assert set(PAGES) <= reached, [name(page) for page in PAGES if page not in reached]


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_python_is_python(block: Block) -> None:
    ast.parse(block.text)


def test_published_numbers_are_those_of_the_recipes() -> None:
    text = (ROOT / "docs" / "reproducing-star.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(star/[\w-]+)` \| ([\d.]+|none[\w ]*) \|", text, re.MULTILINE))
    ours = ("camvid", "clothing")
    published = {name for name in shipped() if name.startswith("star/") and not any(o in name for o in ours)}
    assert set(rows) == published
    for recipe, value in rows.items():
        header = shipped()[recipe].read_text(encoding="utf-8")
        found = re.search(r"# Published: ([\d.]+) %", header)
        assert (found[1] if found else "none") == value.split()[0], recipe


def test_compat_names_are_those_of_the_schema() -> None:
    text = (ROOT / "docs" / "reproducing-star.md").read_text(encoding="utf-8")
    table = text.partition("| `compat` |")[2].partition("\n\n")[0]
    options = check_method(load_recipe("demo")).model_json_schema()
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == options["properties"]["compat"]["items"]["enum"]


def test_table_of_methods_tells_the_truth() -> None:
    from perdure.methods import METHODS

    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Methods")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]
    runs = ("available", "in work: not yet shown to learn")
    here = {method for row in rows if row[-1] in runs for method in re.findall(r"`([\w-]+)`", row[0])}
    later = {method for row in rows if row[-1] == "planned" for method in re.findall(r"`([\w-]+)`", row[0])}
    assert here == set(METHODS)
    assert later.isdisjoint(METHODS)
