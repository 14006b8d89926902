"""Recipes as text: overrides, plain complaints, and what is written into a run folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from perdure.config.build import check_method
from perdure.config.load import (
    dump_recipe,
    load_recipe,
    parse_recipe,
    read_raw,
    same_experiment,
    shipped,
    split_override,
)
from perdure.config.recipe import Recipe
from perdure.errors import UsageError
from perdure.files import nesting
from perdure.networks.build import build_network

PLAIN = {
    "name": "plain",
    "data": {"name": "digits"},
    "stream": {"base": 6, "step": 2},
    "method": "star",
}


def recipe(**changes: object) -> Recipe:
    """The plain recipe with some sections replaced."""
    return parse_recipe({**PLAIN, **changes}, "plain")


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The plain recipe as a file."""
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    return str(path)


def test_a_name_is_short_for_a_section() -> None:
    short, full = recipe(), recipe(method={"name": "star"})
    assert short == full
    assert recipe(network="residual_unet").network.name == "residual_unet"


def test_a_folder_in_place_of_a_recipe_is_told_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder, not a recipe") as told:
        load_recipe(str(tmp_path))
    assert f"perdure check --data {tmp_path}" in told.value.hint and "known:" not in told.value.hint
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(PLAIN))
    with pytest.raises(UsageError, match="is a run folder, not a recipe") as told:
        load_recipe(str(tmp_path))
    assert f"--out {tmp_path} --resume" in told.value.hint


def test_a_task_has_no_name_that_turns_the_writing() -> None:
    tasks = [{"name": "organs\u202e", "data": "phantoms"}]
    with pytest.raises(UsageError, match=r"holds the control character \\u202e"):
        recipe(data=None, stream={"kind": "data_sets", "tasks": tasks})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("training.epochs=5", 5),
        ("training.lr=1e-3", 0.001),
        ("training.lr=0.5", 0.5),
        ("training.later_epochs=null", None),
        ("training.freeze_norm=false", False),
        ("augment.area=[0.5,1]", (0.5, 1.0)),
        ("evaluate.size=", None),
        ("stream.order=[three, 1]", ("three", 1)),
        ("about=a=b", "a=b"),
        ("stream.short_last=true", True),
        ("stream.pool=test", "test"),
        ("stream.pool=null", None),
        ("training.momentum=0", 0),
        ("training.schedule=stairs", "stairs"),
        ("training.stairs=[0.5, 0.25, 0.1]", (0.5, 0.25, 0.1)),
    ],
)
def test_override(text: str, expected: object, file: str) -> None:
    loaded: object = load_recipe(file, [text])
    for part in text.partition("=")[0].split("."):
        loaded = getattr(loaded, part)
    assert loaded == expected


def test_overrides_of_open_sections(file: str) -> None:
    loaded = load_recipe(file, ["method.lambda_sad=0.1", "data.size=48", "network.width=8", "data.per_scene=[1,2]"])
    assert loaded.method.name == "star"
    assert loaded.method.settings == {"lambda_sad": 0.1}
    assert loaded.data.settings == {"size": 48, "per_scene": [1, 2]}
    assert loaded.network.settings == {"width": 8}
    other = load_recipe(file, ["method.lambda_sad=0.1", "method=finetune"])  # another method has other settings
    assert (other.method.name, other.method.settings) == ("finetune", {})


def test_later_override_wins_and_the_file_stays(file: str) -> None:
    before = Path(file).read_text()
    assert load_recipe(file, ["seed=1", "seed=2"]).seed == 2
    assert Path(file).read_text() == before


def test_override_in_an_empty_section(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(yaml.safe_dump(PLAIN) + "training:\n")
    assert load_recipe(str(path), ["training.epochs=3"]).training.epochs == 3


def test_home_is_expanded(file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_recipe(file, ["data.root=~/photos"]).data.root == tmp_path / "photos"


@pytest.mark.parametrize("text", ["epochs", "=5", "x=[1", "x=2024-13-45", "x=!!python/object/apply:os.getcwd []"])
def test_no_override(text: str) -> None:
    with pytest.raises(UsageError):
        split_override(text)


@pytest.mark.parametrize(
    ("changes", "what", "hint"),
    [
        ({"trainin": {}}, "unknown key 'trainin'", "did you mean 'training'?"),
        ({"stream": {"base": 1, "step": 1, "ordr": 1}}, "unknown key 'stream.ordr'", "did you mean 'stream.order'?"),
        ({"stream": {"base": 1}}, "the key 'stream.step' is missing", "classes of every later task"),
        ({"stream": {"base": 0, "step": 1}}, "stream.base: input should be greater", "classes of the first task"),
        ({"stream": {"base": 1, "step": 1, "order": 3}}, "stream.order: input should be", "class order"),
        ({"stream": 3}, "stream is not a mapping of keys (got 3)", ""),
        ({"augment": {"std": [1]}}, "augment.mean and augment.std must have the same length", ""),
        ({"augment": {"area": [2, 1]}}, "augment.area must be two shares", ""),
        ({"training": {"lr": float("nan")}}, "training.lr: input should be a finite number", "learning rate"),
        ({"training": {"momentum": 1}}, "training.momentum: input should be less than 1", "of SGD"),
        ({"training": {"momentum": -0.1}}, "training.momentum: input should be greater", "of SGD"),
        ({"training": {"schedule": "stair"}}, "training.schedule: input should be 'constant'", "learning rate"),
        ({"training": {"stairs": [0.1, 0.1]}}, "the key 'training.stairs.3' is missing", "schedule stairs"),
        ({"stream": {"base": 1, "step": 1, "pool": "train"}}, "stream.pool: input should be 'val'", "unlabelled"),
        ({"engine": {"trackers": ["x"]}}, "engine.trackers.1: input should be 'tensorboard'", "tracking"),
    ],
)
def test_complaints_name_the_key_and_what_it_means(changes: dict[str, object], what: str, hint: str) -> None:
    with pytest.raises(UsageError) as told:
        recipe(**changes)
    assert told.value.what.startswith("recipe 'plain': ")
    assert what in told.value.what and "\n" not in told.value.what
    assert hint in told.value.hint
    assert told.value.exit_code == 2


def test_long_values_are_cut() -> None:
    with pytest.raises(UsageError) as told:
        recipe(training={"epochs": "many" * 1000})
    assert len(told.value.what) < 300


def test_written_recipe_is_the_same_experiment_without_places(tmp_path: Path) -> None:
    written = recipe(
        data={"name": "folders", "root": "/home/me/photos", "classes": "/home/me/classes.txt", "values": {255: 1}},
        network={"name": "deeplab", "weights": "/srv/weights/r101.safetensors"},
        stream={"base": 1, "step": 1, "setting": "partition", "partition_file": "/home/me/lists.npy"},
        method={"name": "package.module:Class", "teacher": "C:\\models\\t.pth", "rate": 0.5, "text": "and/or"},
    )
    dump_recipe(written, tmp_path / "recipe.yaml")
    text = (tmp_path / "recipe.yaml").read_text()
    assert "/home" not in text and "/srv" not in text and "models" not in text
    back = parse_recipe(read_raw(str(tmp_path / "recipe.yaml")), "recipe.yaml")
    assert (back.data.root, back.stream.partition_file) == (None, None)
    assert back.data.settings == {"classes": "classes.txt", "values": {"255": 1}}
    assert back.network.settings == {"weights": "r101.safetensors"}
    assert back.method.settings == {"teacher": "t.pth", "rate": 0.5, "text": "and/or"}
    assert same_experiment(back, written) is None
    assert same_experiment(written, written) is None


@pytest.mark.parametrize("name", list(shipped()))
def test_shipped_recipe_survives_being_written(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(name)
    dump_recipe(loaded, tmp_path / "recipe.yaml")
    # not equal where it names folders of data sets, for these are never written
    assert same_experiment(load_recipe(str(tmp_path / "recipe.yaml")), loaded) is None
    dump_recipe(load_recipe(str(tmp_path / "recipe.yaml")), tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_bytes() == (tmp_path / "recipe.yaml").read_bytes()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=2", "seed"),
        ("training.lr=0.5", "training.lr"),
        ("method.lambda_sad=0.5", "method.lambda_sad"),
        ("method=finetune", "method.name"),
        ("network.width=3", "network.width"),
        ("evaluate.size=64", "evaluate.size"),
        ("engine.precision=bf16", "engine.precision"),
        ("name=other", "name"),
        ("training.momentum=0", "training.momentum"),
        ("training.stairs=[0.5,0.25,0.1]", "training.stairs"),
    ],
)
def test_what_makes_another_experiment(override: str, key: str, file: str) -> None:
    assert same_experiment(load_recipe(file), load_recipe(file, [override])) == key


@pytest.mark.parametrize(
    "override",
    [
        "engine.workers=4",
        "engine.device=cpu",
        "report.samples=1",
        "about=x",
        "data.root=there",
        "evaluate.batch_size=9",
    ],
)
def test_what_does_not(override: str, file: str) -> None:
    assert same_experiment(load_recipe(file), load_recipe(file, [override])) is None


def shown_recipes() -> list[str]:
    """Recipes that stand in the docs in full."""
    pages = (Path(__file__).resolve().parents[2] / "docs").rglob("*.md")
    blocks = [b for page in pages for b in re.findall(r"^```yaml\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)]
    return [block for block in blocks if block.startswith("name: ")]


@pytest.mark.parametrize("text", shown_recipes())
def test_recipe_in_the_docs_is_one(text: str) -> None:
    shown = parse_recipe(yaml.safe_load(text), "docs")
    check_method(shown)
    assert shown.name and shown.about
    build_network(shown.network.name, 2, len(shown.augment.mean), **shown.network.settings).check_size(
        (shown.augment.crop,) * 2
    )


def test_recipes_do_not_change() -> None:
    with pytest.raises(ValidationError):
        recipe().seed = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\nname: b", "the key 'name' occurs twice"),
        ("data: {name: digits, name: voc}", "the key 'name' occurs twice"),
        ("a: &a [1, 2]\nb: [*a, *a]", "references to other values"),
        ("[" * 5000, "nested too deeply"),
    ],
)
def test_yaml_that_no_recipe_needs_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ('{"a": [1, [2]], "b": {}}', 3),
        (r'["[[[", "\"[[", "\\", {"]": 1}]', 2),
        ('"' + r"\"" * 150_000, 0),  # a text without an end, whose end is not looked for from every quotation mark
        ('["' + r"\"[" * 150_000, 1),
    ],
    ids=["plain", "brackets in texts", "no end", "no end in a list"],
)
def test_levels_of_brackets_are_counted_in_one_pass(text: str, levels: int) -> None:
    assert nesting(text) == levels
