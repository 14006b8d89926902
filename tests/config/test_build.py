"""From a recipe to objects: what is checked, and what depends on the seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image as Pil

from perdure.config import build
from perdure.config.build import (
    build_experiment,
    build_preparation,
    build_tasks,
    check_method,
    method_class,
)
from perdure.config.load import parse_recipe
from perdure.config.recipe import Recipe
from perdure.data.catalog import open_source
from perdure.errors import UsageError
from perdure.labels import IGNORE
from perdure.methods import METHODS
from perdure.methods.method import Method
from perdure.methods.options import Options
from perdure.metrics.results import read_results

SMALL = {
    "name": "small",
    "data": {"name": "digits", "size": 32, "train": 24, "val": 4, "test": 8},
    "stream": {"base": 6, "step": 2},
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
}


CLASSES = {
    "name": "classes",
    "data": "single_digits",
    "stream": {"base": 5, "step": 5},
    "network": {"name": "cosine_resnet", "size": "small"},
    "augment": {"crop": 32, "flip": 0.0, "mean": [0.0], "std": [1.0]},
    "method": "finetune",
}


def recipe(**changes: object) -> Recipe:
    """The small recipe with some sections replaced."""
    return parse_recipe({**SMALL, **changes}, "small")


def classes(**changes: object) -> Recipe:
    """A recipe for classification with some sections replaced."""
    return parse_recipe({**CLASSES, **changes}, "classes")


def build_method(made: Recipe, pretrained: bool = True) -> Method[Options]:
    """The method of a recipe, for images as the recipe shows them."""
    kind = "classification" if made.network.name == "cosine_resnet" else "segmentation"
    return build.build_method(made, build_preparation(made, kind), pretrained)


def test_experiment() -> None:
    experiment = build_experiment(recipe())
    assert [len(task.new) for task in experiment.stream.tasks] == [6, 2, 2]
    assert experiment.sources[0].name == "digits"
    assert isinstance(experiment.method, method_class("finetune"))


def test_upper_bound_sees_one_task_with_the_groups_of_all() -> None:
    stream = build_experiment(recipe(method="joint")).stream
    assert [len(task.new) for task in stream.tasks] == [10]
    assert [len(group) for group in stream.groups] == [6, 2, 2]


def test_first_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = build_method(recipe()).state_dict()
    torch.manual_seed(1)
    again = build_method(recipe()).state_dict()
    other = build_method(recipe(seed=2)).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_building_leaves_the_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    build_method(recipe())
    assert torch.equal(torch.rand(2), expected)


def test_weights_are_not_needed_to_restore_a_run() -> None:
    missing = recipe(network={**SMALL["network"], "weights": "gone.safetensors"})  # type: ignore[dict-item]
    build_method(missing, pretrained=False)
    with pytest.raises(Exception, match=r"gone\.safetensors does not exist"):
        build_method(missing)


@pytest.mark.parametrize("crop", [30, 33, 62])
def test_crop_has_to_fit_the_stride(crop: int) -> None:
    with pytest.raises(UsageError, match=f"augment.crop={crop}: .* multiples of 4"):
        build_method(recipe(augment={"crop": crop}))


def test_channels_follow_the_normalisation() -> None:
    grey = recipe(augment={"crop": 32, "mean": [0.5], "std": [0.25]})
    assert build_method(grey).network.in_channels == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", METHODS)
def test_shipped_methods_are_methods(name: str) -> None:
    assert method_class(name).Options.model_validate({}) is not None
    assert check_method(recipe(method=name)) == method_class(name).Options()


@pytest.mark.parametrize("text", ["class Mine(:", "1 / 0", "import nothing_of_this_name"])
def test_method_of_a_broken_module(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"broken{abs(hash(text))}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be imported: [A-Za-z]+Error: "):
        method_class(f"broken{abs(hash(text))}:Mine")


def test_method_by_its_place() -> None:
    assert method_class("perdure.methods.finetune:Finetune") is method_class("finetune")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("finetunee", "no method 'finetunee'"),
        ("perdure.methods.finetune:Nothing", "cannot be imported"),
        ("no.such.module:X", "cannot be imported"),
        (":X", "cannot be imported"),
        ("perdure.methods.finetune:", "cannot be imported"),
        ("perdure.methods.finetune:FinetuneOptions", "is not a method"),
        ("torch.nn:Module", "is not a method: it does not derive from"),
        ("math:pi", "is not a method"),
    ],
)
def test_no_method(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        method_class(name)


def test_experiment_of_classification() -> None:
    experiment = build_experiment(classes())
    assert experiment.kind == "classification"
    assert experiment.stream.protocol == "class-incremental 5-5"
    assert [len(task.new) for task in experiment.stream.tasks] == [5, 5]
    assert experiment.method.network.in_channels == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changed", "what", "hint"),
    [
        (
            lambda: classes(method="star"),
            "the method 'star' is for segmentation, but the data set 'single_digits' has one class an image",
            "methods for it: finetune, joint, independent, lwf, ccsi",
        ),
        (
            lambda: classes(network="deeplab"),
            "the network 'deeplab' is for segmentation, but the data set 'single_digits' has one class an image",
            "networks for it: cosine_resnet",
        ),
        (
            lambda: recipe(network={"name": "cosine_resnet", "size": "small"}),
            "the network 'cosine_resnet' is for classification, but the data set 'digits' labels every pixel",
            "networks for it: deeplab, residual_unet, clip_segmenter, unit_unet",
        ),
        (
            lambda: recipe(method="ccsi"),
            "the method 'ccsi' is for classification, but the data set 'digits' labels every pixel",
            "methods for it: finetune, joint, independent, lwf, star",
        ),
    ],
)
def test_method_network_and_data_are_of_one_kind(changed: Callable[[], Recipe], what: str, hint: str) -> None:
    with pytest.raises(UsageError) as told:
        build_experiment(changed())
    assert told.value.what == what
    assert told.value.hint.startswith(hint)


def test_kinds_of_methods() -> None:
    assert method_class("star").kinds == {"segmentation"}
    assert method_class("ccsi").kinds == {"classification"}
    for name in ("finetune", "joint"):
        assert method_class(name).kinds == {"segmentation", "classification"}


def test_method_that_names_no_kinds_is_for_segmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(method_class("finetune"), "kinds")
    assert method_class("finetune").kinds == {"segmentation"}
    build_experiment(recipe())
    with pytest.raises(UsageError, match=r"the method 'finetune' is for segmentation, but .* one class an image"):
        build_experiment(classes())


@pytest.mark.parametrize(("crop", "border"), [(32, 2), (28, 0), (24, 0)])
def test_images_with_one_class_are_squared(crop: int, border: int) -> None:
    plan = classes(augment={"crop": crop, "flip": 0.0, "mean": [0.25], "std": [0.5]})
    source = open_source("single_digits", None)
    stream = build_tasks(plan, source)
    with stream.opened(stream.tasks[0]) as task:
        for view in (task.train(), task.validation(), task.tests()["test"]):
            shown = view[0]
            image, label, name = shown.image, shown.label, shown.name
            assert image.shape == (1, crop, crop) and image.dtype == torch.float32
            assert label.shape == () and int(label) == int(source.mask(view.split, name))
            if border:
                inside = torch.from_numpy(source.image(view.split, name).copy()).float() / 255
                framed = torch.nn.functional.pad(inside, (border,) * 4)
                torch.testing.assert_close(image, (framed - 0.25) / 0.5)


def test_only_training_images_are_flipped() -> None:
    stream = build_tasks(
        classes(augment={"crop": 28, "flip": 1.0, "mean": [0.0], "std": [1.0]}), open_source("single_digits", None)
    )
    with stream.opened(stream.tasks[0]) as task:
        for view, turned in ((task.train(), True), (task.validation(), False), (task.tests()["test"], False)):
            plain = view.source.image(view.split, view.names[0])[:, :, :: -1 if turned else 1]
            assert np.array_equal((view[0].image * 255).round().byte().numpy(), plain)


def test_stream_options_reach_the_stream() -> None:
    plan = classes(stream={"base": 4, "step": 4, "short_last": True, "pool": "test"})
    stream = build_experiment(plan).stream
    assert [len(task.new) for task in stream.tasks] == [4, 4, 2]
    assert "transductive" in stream.protocol
    with stream.opened(stream.tasks[0]) as task:
        assert task.pool() is not None and task.pool().split == "test"  # type: ignore[union-attr]


def test_a_pool_from_a_folder_has_the_channels_of_the_data(tmp_path: Path) -> None:
    Pil.new("RGB", (20, 20), (9, 9, 9)).save(tmp_path / "x.png")
    stream = build_experiment(classes(stream={"base": 5, "step": 5, "pool": "folder", "pool_folder": tmp_path})).stream
    assert stream.protocol == "class-incremental 5-5, 1 unlabelled images of their own in training"
    with stream.opened(stream.tasks[0]) as task:
        pool = task.pool()
        assert pool is not None
        assert pool[0].image.shape == task.train()[0].image.shape and int(pool[0].label) == IGNORE


@pytest.mark.parametrize("stream", [{"pool": "folder"}, {"pool_folder": "x"}, {"pool": "val", "pool_folder": "x"}])
def test_pool_and_its_folder_belong_together(stream: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"stream\.pool_folder is"):
        build_experiment(classes(stream={"base": 5, "step": 5} | stream))


def test_plain_sgd_without_momentum_has_no_nesterov() -> None:
    method = build_method(classes(training={"momentum": 0, "lr": 0.1, "schedule": "stairs"}))
    stream = build_experiment(classes()).stream
    with stream.opened(stream.tasks[0]) as task:
        method.begin(task)
        (phase,) = method.phases(task)
        optimizer = phase.optimizer()  # type: ignore[union-attr]
    assert {group["momentum"] for group in optimizer.param_groups} == {0}
    assert not any(group["nesterov"] for group in optimizer.param_groups)
    assert phase.schedule(0, 100) == 1 and phase.schedule(7, 100) == 0.3  # type: ignore[union-attr]


@pytest.mark.e2e
@pytest.mark.parametrize("method", ["finetune", "joint"])
def test_run_of_classification(method: str, tmp_path: Path, cli) -> None:
    text = yaml.safe_dump(CLASSES | {"method": method, "evaluate": {"batch_size": 180}, "report": {"samples": 2}})
    (tmp_path / "classes.yaml").write_text(text)
    quick = ["training.epochs=1", "training.batch_size=64", "training.freeze_norm=false", "engine.threads=1"]
    words = [*quick, "engine.device=cpu", "engine.trackers=[]", "--out", tmp_path / "run", "--quiet"]
    done = cli("run", tmp_path / "classes.yaml", *words)
    assert done.code == 0, done.err
    rows = [row for row in read_results(tmp_path / "run/results.csv") if row.class_id is None]
    accuracy = [row for row in rows if row.figure.startswith("accuracy.all[")]
    tested = [360] if method == "joint" else [180, 360]
    assert [(row.after_task, row.n) for row in accuracy] == list(enumerate(tested))
    assert all(0 <= row.value <= 100 for row in accuracy)
    assert not [row.figure for row in rows if row.figure.startswith(("miou", "iou", "dice", "hd95"))]
    described = json.loads((tmp_path / "run/stream.json").read_text())
    assert (described["kind"], described["background"]) == ("classification", None)
    counts = [json.loads(p.read_text()) for p in sorted((tmp_path / "run/tasks").glob("*/counts.json"))]
    for found, images in zip(counts, tested, strict=True):
        matrix = np.asarray(found["sets"]["test"]["matrix"])
        assert matrix.sum() == images and not matrix[0].any() and not matrix[:, 0].any()
    page = (tmp_path / "run/report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "accuracy" in page
    assert (tmp_path / "run/MODEL_CARD.md").is_file()
    audited = cli("audit", tmp_path / "run")
    assert audited.code == 0, audited.out + audited.err


@pytest.mark.e2e
def test_a_run_measured_on_validation_images_needs_no_test_image(tmp_path: Path, tiny: str, cli) -> None:
    (tmp_path / "tiny.yaml").write_text(tiny)
    words = ["data.test=0", "data.val=6", "method=finetune", "training.lr=1e-9", "report.samples=2"]
    run = tmp_path / "run"
    done = cli("run", tmp_path / "tiny.yaml", *words, "evaluate.split=val", "--out", run)
    assert done.code == 0, done.err
    assert "on validation images" in done.err
    counts = [json.loads(p.read_text())["sets"] for p in sorted(run.glob("tasks/*/counts.json"))]
    assert [list(sets) for sets in counts] == [["validation"]] * 3
    assert counts[-1]["validation"]["cases"] == 6
    assert {row.split for row in read_results(run / "results.csv")} == {"val"}
    # nothing can be learned at this rate: each task says so, with what to try
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    names = {c["id"]: c["name"] for c in json.loads((run / "stream.json").read_text())["classes"]}
    zero: dict[int, list[str]] = {}
    for line in lines:
        if line.get("event") == "unlearned":
            zero.setdefault(line["task"], []).append(names[line["class_id"]])
    assert set(zero) == {1, 2, 3} and done.err.count("not learned") == 3
    assert "training.epochs" in done.err and "training.later_epochs" in done.err
    page, card = ((run / name).read_text() for name in ("report.html", "MODEL_CARD.md"))
    assert all(f"<b>{', '.join(told)}</b>" in page for told in zero.values())
    assert card.count("**Not learned**") == 3
    ledger = json.loads(next(run.glob("tasks/00*/ledger.json")).read_text())
    made_from = {entry["made_from"] for entry in ledger["items"] if entry["kind"] == "preview"}
    assert made_from == {"one validation image, shown in the report"}
    again = cli("run", tmp_path / "tiny.yaml", *words, "data.test=8", "--resume", "--out", run)
    assert again.code == 1 and "evaluate.split" in again.err
    wrong = cli("run", tmp_path / "tiny.yaml", "evaluate.split=train", "--out", tmp_path / "other")
    assert wrong.code == 2 and "evaluate.split" in wrong.err
