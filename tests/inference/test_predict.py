"""A run's model on new images: any size, any 8-bit format, masks at the image's own size."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from perdure.data.catalog import open_source
from perdure.data.readers.inputs import find_images
from perdure.errors import DataError, RunError
from perdure.labels import IGNORE
from perdure.metrics.results import read_results
from perdure.predict import Trained, predict_files
from perdure.run_folder import RunFolder


def segment(model: Trained, image: np.ndarray) -> np.ndarray:
    """Label map of a photograph ``(H, W, 3)``."""
    return model.predict(image.transpose(2, 0, 1)).labels


@pytest.fixture(scope="module")
def model(star_run: Path) -> Trained:
    """The finished model, changed so that it sees every class somewhere: it has learned next to nothing."""
    model = Trained.open(star_run, "cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for classifier in model.method.network.classifiers:  # type: ignore[attr-defined]
            classifier.weight.copy_(torch.randn(classifier.weight.shape, generator=draw))
    assert len(np.unique(segment(model, photo(96, 96)))) >= 6
    return model


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 255, (height, width, 3), np.uint8)


@pytest.mark.parametrize("shape", [(32, 32), (31, 33), (1, 1), (5, 70), (64, 3), (97, 101)])
def test_any_size_gives_a_label_for_each_pixel(shape: tuple[int, int], model: Trained) -> None:
    labels = segment(model, photo(*shape))
    assert labels.shape == shape and labels.dtype == np.int16
    assert set(np.unique(labels)) <= set(range(11))


@pytest.mark.parametrize("shape", [(32, 48), (30, 33)])
def test_labels_are_the_methods_own(shape: tuple[int, int], model: Trained) -> None:
    image = photo(*shape)
    pixels = (torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        expected = model.method.predict(pixels).labels()[0].numpy()
    assert np.array_equal(segment(model, image), expected)


def test_images_that_fit_are_not_padded(model: Trained) -> None:
    network = model.method.network  # type: ignore[attr-defined]
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = network.full_logits(image)
        repeated = network.full_logits(torch.cat([image, image[..., -1:]], 3)[..., :33])
    assert whole.shape == (1, 10, 32, 32) and repeated.shape == (1, 10, 32, 33)
    plain = torch.nn.functional.interpolate(network(image)[0], (32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(whole, plain)


def test_large_images_are_cut_into_windows(model: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, ...]] = []
    predict = type(model.method).predict

    def watched(self: object, images: torch.Tensor):
        sizes.append(tuple(images.shape[2:]))
        return predict(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model.method), "predict", watched)
    small = replace(model, preparation=model.preparation.model_copy(update={"window": 32}))
    assert segment(small, photo(40, 75)).shape == (40, 75)
    assert set(sizes) == {(32, 32)} and len(sizes) == 2 * 4


def test_images_are_scaled_as_in_the_evaluation(
    star_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(star_run, tmp_path / "run"))
    stream = json.loads((run / "stream.json").read_text())
    for task in stream["tasks"]:
        task["preparation"]["size"] = 24
    (run / "stream.json").write_text(json.dumps(stream))
    model = Trained.open(run, "cpu")
    shapes: list[tuple[int, ...]] = []
    predict = type(model.method).predict
    monkeypatch.setattr(
        type(model.method), "predict", lambda self, x: shapes.append(tuple(x.shape[2:])) or predict(self, x)
    )
    assert segment(model, photo(60, 91)).shape == (60, 91)
    assert shapes == [(24, 36)]


def write_all_formats(folder: Path) -> dict[str, Image.Image]:
    """One picture in every format; the grey ones are grey."""
    folder.mkdir()
    colour = Image.fromarray(photo(33, 45))
    files = {
        "rgb.png": colour,
        "alpha.png": colour.convert("RGBA"),
        "palette.png": colour.quantize(16),
        "grey.png": colour.convert("L"),
        "greyalpha.png": colour.convert("L").convert("LA"),
        "bilevel.png": colour.convert("1"),
        "photo.JPG": colour,
        "print.jpeg": colour.convert("CMYK"),
        "scan.tif": colour,
        "old.bmp": colour,
        "web.webp": colour,
    }
    for name, picture in files.items():
        picture.save(folder / name)
    return files


def test_formats_and_what_is_written(model: Trained, tmp_path: Path) -> None:
    files = write_all_formats(tmp_path / "in")
    (tmp_path / "in/readme.txt").write_text("no image")
    (tmp_path / "in/.hidden.png").write_bytes(b"")
    (tmp_path / "in/sub").mkdir()
    seen: list[tuple[int, int]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = predict_files(model, [tmp_path / "in"], tmp_path / "out", lambda *n: seen.append(n))
    assert seen == [(k, len(files)) for k in range(1, len(files) + 1)]
    stems = {Path(name).stem for name in files}
    assert {p.relative_to(tmp_path / "out").as_posix() for p in written} == {
        f"{kind}/{stem}.png" for kind in ("index", "color") for stem in stems
    }
    palette = model.space.palette()
    for stem in stems:
        index, color = (Image.open(tmp_path / "out" / kind / f"{stem}.png") for kind in ("index", "color"))
        assert (index.mode, color.mode, index.size) == ("L", "P", (45, 33))
        assert np.array_equal(np.asarray(index), np.asarray(color))
        assert np.array_equal(np.asarray(color.convert("RGB")), palette[np.asarray(index)])
    labels = {stem: np.asarray(Image.open(tmp_path / "out/index" / f"{stem}.png")) for stem in stems}
    assert np.array_equal(labels["rgb"], labels["alpha"]) and np.array_equal(labels["rgb"], labels["scan"])
    assert np.array_equal(labels["grey"], labels["greyalpha"])
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    assert [c["id"] for c in classes] == list(range(11))
    assert all(c["color"] == palette[c["id"]].tolist() for c in classes)
    assert not {p.name for p in (tmp_path / "out").iterdir()} - {"index", "color", "classes.json"}


def test_a_damaged_image_among_others_says_how_many_masks_are_there(model: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "d"):
        Image.new("RGB", (20, 20)).save(tmp_path / f"in/{name}.png")
    (tmp_path / "in/c.png").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"c\.png is not a readable image.*; 2 of 4 images are written to .*out"):
        predict_files(model, [tmp_path / "in"], tmp_path / "out", lambda *_: None)
    for kind in ("index", "color"):
        assert sorted(p.name for p in (tmp_path / "out" / kind).iterdir()) == ["a.png", "b.png"]


def test_inputs_are_files_and_folders_in_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_images([tmp_path / "b", tmp_path / "a.png"])
    assert [p.name for p in found] == ["1.jpg", "2.png", "a.png"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to itself", "device"])
def test_an_image_of_a_folder_that_cannot_be_read_is_told_and_not_left_out(kind: str, tmp_path: Path) -> None:
    for name in ("a.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    place = tmp_path / "b.png"
    match kind:
        case "folder":
            place.mkdir()
        case "pipe":
            os.mkfifo(place)
        case "link to nothing":
            place.symlink_to(tmp_path / "gone.png")
        case "link to itself":
            place.symlink_to(place)
        case _:
            place.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"b\.png is named like an image and is no file"):
        find_images([tmp_path])


def test_prediction_of_an_image_does_not_depend_on_the_others(model: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for k in range(3):
        Image.fromarray(photo(20 + k, 30, k)).save(tmp_path / f"in/{k}.png")
    predict_files(model, [tmp_path / "in"], tmp_path / "all", lambda *_: None)
    predict_files(model, [tmp_path / "in/2.png"], tmp_path / "one", lambda *_: None)
    assert (tmp_path / "all/index/2.png").read_bytes() == (tmp_path / "one/index/2.png").read_bytes()


def test_run_that_is_sealed_so_far(star_run: Path, tmp_path: Path, cli) -> None:
    run = Path(shutil.copytree(star_run, tmp_path / "run"))
    (run / "tasks/01-07-08/done").unlink()  # as if stopped in the second task; what is behind it does not count
    Image.fromarray(photo(32, 32)).save(tmp_path / "x.png")
    done = cli("predict", run, "-i", tmp_path / "x.png", "-o", tmp_path / "out", "--device", "cpu")
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("1 image(s) segmented into 6 classes")
    assert [c["id"] for c in json.loads((tmp_path / "out/classes.json").read_text())] == list(range(7))
    assert set(np.unique(np.asarray(Image.open(tmp_path / "out/index/x.png")))) <= set(range(7))
    (run / "tasks/00-01-06/done").unlink()
    with pytest.raises(RunError, match="is sealed yet"):
        Trained.open(run, "cpu")


def test_model_is_that_of_the_last_task(star_run: Path) -> None:
    model = Trained.open(star_run, "cpu")
    saved = load_file(star_run / "tasks/02-09-10/weights.safetensors")
    state = model.method.state_dict()
    assert saved and all(torch.equal(state[k], v) for k, v in saved.items())
    assert model.seen == tuple(range(1, 11))
    assert not model.method.training  # type: ignore[attr-defined]


ODD = """\
name: odd
data: {name: folders, root: %s, holdout: 3}
stream: {base: 1, step: 1}
network: {backbone: tiny_resnet, tiny_channels: [4, 4, 4, 4], output_stride: 16, width: 8, dilations: [1]}
augment: {crop: 32}
evaluate: {size: %s, protocol: %s, batch_size: 2}
method: finetune
training: {epochs: 1, batch_size: 2}
engine: {device: cpu, threads: 1, trackers: []}
report: {samples: 1}
"""


@pytest.mark.parametrize(
    ("size", "protocol", "pixels"),
    [("null", "whole", 37 * 50), ("20", "whole", 37 * 50), ("20", "centre_crop", 20 * 20)],
)
def test_test_images_that_do_not_fit_the_stride_are_measured(
    size: str, protocol: str, pixels: int, tmp_path: Path, cli
) -> None:
    for part in ("images", "masks"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for k in range(6):
        Image.fromarray(photo(37, 50, k)).save(tmp_path / f"data/images/{k}.png")
        mask = np.repeat(np.arange(3, dtype=np.uint8), [10, 15, 25])[None].repeat(37, 0)
        Image.fromarray(mask).save(tmp_path / f"data/masks/{k}.png")
    (tmp_path / "data/classes.txt").write_text("1 a\n2 b\n")
    (tmp_path / "odd.yaml").write_text(ODD % (tmp_path / "data", size, protocol))
    done = cli("run", tmp_path / "odd.yaml", "--out", tmp_path / "run", "--quiet")
    assert done.code == 0, done.err
    counts = json.loads((tmp_path / "run/tasks/01-b/counts.json").read_text())["sets"]
    assert sum(sum(map(sum, c["matrix"])) for c in counts.values()) == 2 * pixels
    model = Trained.open(tmp_path / "run", "cpu")
    assert segment(model, photo(37, 50)).shape == (37, 50)


# The run's own figure -----------------------------------------------------------------------------------------------


def figure_of(masks: Path, run: Path, truths: dict[str, np.ndarray]) -> float:
    """miou.all of masks that were written, by plain numpy: classes of the ground truth and label 0."""
    ids = [c.id for c in RunFolder.existing(run).stream().classes]
    right, union, truth_of = (dict.fromkeys((0, *ids), 0) for _ in range(3))
    for name, truth in truths.items():
        with Image.open(masks / "index" / f"{name}.png") as opened:
            guess = np.asarray(opened).astype(int)
        assert guess.shape == truth.shape
        counted = truth != IGNORE
        for c in right:
            right[c] += int(((truth == c) & (guess == c) & counted).sum())
            union[c] += int((((truth == c) | (guess == c)) & counted).sum())
            truth_of[c] += int((truth == c).sum())
    shown = [c for c in right if truth_of[c]]
    return 100 * sum(right[c] / union[c] for c in shown) / len(shown)


def own_figure(run: Path, name: str) -> float:
    rows = [row for row in read_results(run / "results.csv") if row.figure == name and row.class_id is None]
    return rows[-1].value


def test_masks_that_predict_writes_have_the_runs_own_figure(star_run: Path, tmp_path: Path, cli) -> None:
    source = open_source("digits", None, {"size": 32, "train": 24, "val": 4, "test": 8})
    (tmp_path / "in").mkdir()
    for name in source.names("test"):
        Image.fromarray(source.image("test", name).transpose(1, 2, 0)).save(tmp_path / f"in/{name}.png")
    done = cli("predict", star_run, "-i", tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.err
    truths = {name: source.mask("test", name).astype(int) for name in source.names("test")}
    expected = own_figure(star_run, "miou.all[bg=in,absent=skip]")
    assert figure_of(tmp_path / "out", star_run, truths) == pytest.approx(expected, abs=0.01)


@pytest.mark.real
@pytest.mark.parametrize("evaluate", [[], ["evaluate.size=120", "evaluate.window=96"]])
def test_masks_of_photographs_have_the_runs_own_figure(
    evaluate: list[str], shared_data: Path, tmp_path: Path, cli
) -> None:
    """CamVid, whole images, some epochs of a small network; also scaled and cut into windows."""
    root = tmp_path / "camvid"
    for split, count in (("train", 24), ("val", 2), ("test", 12)):
        names = (shared_data / "camvid" / f"{split}.txt").read_text().split()
        chosen = names[:: len(names) // count][:count]
        for folder, ending in ((split, "jpg"), (f"{split}annot", "png")):
            (root / folder).mkdir(parents=True)
            for name in chosen:
                shutil.copy(shared_data / "camvid" / folder / f"{name}.{ending}", root / folder)
        (root / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    changes = ["training.epochs=2", "training.batch_size=8", "report.samples=0", "engine.threads=1"]
    words = [f"data.root={root}", "method=joint", "engine.device=cpu", *changes, *evaluate]
    ran = cli("run", "star/camvid-6-1", *words, "--out", tmp_path / "run", "--quiet")
    assert ran.code == 0, ran.err
    source = open_source("camvid", root)
    done = cli("predict", tmp_path / "run", "-i", root / "test", "-o", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.err
    truths = {name: source.mask("test", name).astype(int) for name in source.names("test")}
    expected = own_figure(tmp_path / "run", "miou.all[bg=out,absent=skip]")
    found = figure_of(tmp_path / "out", tmp_path / "run", truths)
    assert found == pytest.approx(expected, abs=0.01)
