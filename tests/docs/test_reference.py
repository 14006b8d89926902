"""The generated pages are what `make docs` would write now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from perdure.metrics.definitions import DEFINITIONS


@pytest.fixture(scope="module")
def writer(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_reference", root / "scripts" / "write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_up_to_date(writer: ModuleType, root: Path) -> None:
    folder = root / "docs" / "reference"
    pages = writer.pages()
    assert {p.name for p in folder.iterdir()} == set(pages)
    for name, text in pages.items():
        assert (folder / name).read_text(encoding="utf-8") == text, f"docs/reference/{name}: run `make docs`"


def test_check_finds_a_stale_page(writer: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert writer.main([str(tmp_path)]) == 0
    assert writer.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "figures.md").write_text("old", encoding="utf-8")
    capsys.readouterr()
    assert writer.main(["--check", str(tmp_path)]) == 1
    assert "figures.md" in capsys.readouterr().out
    assert (tmp_path / "figures.md").read_text(encoding="utf-8") == "old", "checking writes nothing"


def test_every_figure_and_option_is_described(writer: ModuleType) -> None:
    pages = writer.pages()
    assert all(f"## `{name}`" in pages["figures.md"] for name in DEFINITIONS)
    rows = [line for line in pages["recipes.md"].splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    for row in [line for line in pages["command-line.md"].splitlines() if line.startswith("| `")]:
        assert row.split(" | ")[1].strip(), f"no help: {row}"


def test_docstring_arguments(writer: ModuleType) -> None:
    first = "    one: First\n        goes on, see :func:`there`.\n"
    text = f"Head.\n\nArgs:\n{first}    two: ``x`` and y.\n\nRaises:\n    Error: No.\n"
    assert {k: " ".join(v.split()) for k, v in writer._arguments(text).items()} == {
        "one": "First goes on, see `there`.",
        "two": "`x` and y.",
    }
