"""A run's model on new volumes: label maps on the grid of the file, whatever its orientation."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from perdure.data.catalog import open_source
from perdure.data.readers.inputs import Input, find_cases
from perdure.data.volumes.files import ENDINGS, write_volume
from perdure.data.volumes.preprocessing import Volume3D
from perdure.data.volumes.slices import Slices2D
from perdure.errors import DataError, UsageError
from perdure.inference.case import predict_cases
from perdure.predict import Trained, cases_of_run, predict_files, refuse_run_folder

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")
pytest.importorskip("nnunetv2")

SOURCE = {"kind": "torso", "set": "organs", "size": 32, "train": 2, "test": 2}


def enliven(model: Trained) -> Trained:
    """The model, changed so that it sees every class somewhere: it has learned next to nothing."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for classifier in model.method.network.classifiers:  # type: ignore[attr-defined]
            weight = torch.randn(classifier.weight.shape, generator=draw)
            classifier.weight.copy_(weight - weight.mean(1, keepdim=True))
            classifier.bias.zero_()
    return model


@pytest.fixture(scope="module")
def model(volume_run: Path) -> Trained:
    return enliven(Trained.open(volume_run, "cpu"))


def torso(number: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A test case as a file in RAS orientation has it: voxels ``(X, Y, Z)`` and affine."""
    source = open_source("phantoms", None, SOURCE)
    case = source.read("test", source.names("test")[number])
    return case.image[0].numpy().transpose(2, 1, 0), np.reshape(case.geometry.affine, (4, 4))


def oriented(codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same voxels with their axes in another order and sense."""
    values, affine = torso()
    image = nib.Nifti1Image(values, affine)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))
    return np.asanyarray(turned.dataobj), turned.affine


def in_ras(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels in RAS and the affine of the file, as SimpleITK reads them."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(image.GetDirection()).reshape(3, 3) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    values = sitk.GetArrayFromImage(image).transpose(2, 1, 0)
    return np.asanyarray(nib.as_closest_canonical(nib.Nifti1Image(values, affine)).dataobj), affine


@pytest.fixture(scope="module")
def expected(model: Trained) -> np.ndarray:
    """What the run itself would say of the case, voxels ``(X, Y, Z)`` in RAS."""
    source = open_source("phantoms", None, SOURCE)
    ready = model.preparation.show(source.read("test", source.names("test")[0]))
    assert ready.grid is not None
    labels = predict_cases(model.method.predict, ready.image[None], model.preparation, ready.grid).labels[0].numpy()
    assert len(np.unique(labels)) >= 4
    return labels.transpose(2, 1, 0)


@pytest.mark.parametrize(
    ("codes", "ending"),
    [("RAS", ".nii.gz"), ("LPS", ".nii.gz"), ("SAR", ".nii"), ("PIR", ".mha"), ("LPS", ".nrrd"), ("ASL", ".nii.gz")],
)
def test_label_maps_lie_on_the_grid_of_the_file(
    codes: str, ending: str, model: Trained, expected: np.ndarray, tmp_path: Path
) -> None:
    values, affine = oriented(codes)
    write_volume(tmp_path / f"in/case{ending}", values, affine)
    told: list[tuple[int, int]] = []
    (written,) = predict_files(model, [tmp_path / "in"], tmp_path / "out", lambda *n: told.append(n))
    assert (written, told) == (tmp_path / f"out/case{ending}", [(1, 1)])
    labels, found = in_ras(written)
    np.testing.assert_allclose(found, in_ras(tmp_path / f"in/case{ending}")[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(labels, expected)
    if ending.startswith(".nii"):
        image = nib.load(written)
        stored = nib.load(tmp_path / f"in/case{ending}")
        np.testing.assert_allclose(image.affine, stored.affine, rtol=1e-6, atol=1e-6)
        assert (image.shape, image.get_data_dtype()) == (stored.shape, np.int16)
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    names = ["background", "liver", "spleen", "kidneys", "aorta", "vena_cava", "vertebrae"]
    assert [c["name"] for c in classes] == names
    assert set(np.unique(labels)) <= {c["id"] for c in classes}


def test_the_command_names_its_files_as_nnunet_does(volume_run: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    for number in (0, 1):
        write_volume(tmp_path / f"in/torso_{number}_0000.nii.gz", *torso(number))
    write_volume(tmp_path / "in/patient_2024.nii.gz", *torso())
    done = cli("predict", volume_run, "-i", tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu")
    assert (done.code, done.out) == (0, ""), done.err
    assert done.err.startswith("3 volume(s) segmented into 6 classes -> ")
    inside = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert inside == ["classes.json", "patient_2024.nii.gz", "torso_0.nii.gz", "torso_1.nii.gz"]
    same = [(tmp_path / "out" / name).read_bytes() for name in ("patient_2024.nii.gz", "torso_0.nii.gz")]
    assert same[0] == same[1]


def test_slices_take_volumes_and_single_images(model: Trained, tmp_path: Path) -> None:
    """The network of another run would be 2D; what it says does not matter here, but where it stands does."""
    plan = Slices2D(channels=1, patch=(24, 24), size=24, mean=(0.5,), std=(0.25,))

    def bright(images: torch.Tensor) -> Any:
        from perdure.methods.prediction import Prediction

        assert images.shape[1:] == (1, 24, 24)
        return Prediction.dense(torch.cat([-images, images], 1), (0, 1))

    method = type("Bright", (), {"predict": staticmethod(bright)})()
    slices = replace(model, preparation=plan, method=method)
    values, affine = oriented("PIR")
    write_volume(tmp_path / "in/a.nii.gz", values, affine)
    from PIL import Image

    grey = np.repeat(np.arange(0, 240, 8, np.uint8)[None], 20, 0)
    Image.fromarray(grey).save(tmp_path / "in/b.png")
    written = predict_files(slices, [tmp_path / "in"], tmp_path / "out", lambda *_: None)
    assert [p.relative_to(tmp_path / "out").as_posix() for p in written] == ["a.nii.gz", "index/b.png", "color/b.png"]
    labels = np.asanyarray(nib.load(written[0]).dataobj)
    assert labels.shape == values.shape and 0 < labels.mean() < 1
    assert values[labels == 1].mean() > values[labels == 0].mean() + 500
    mask = np.asarray(Image.open(written[1]))
    assert mask.shape == (20, 30) and not mask[:, :14].any() and mask[:, 16:].all()


class Bad(NamedTuple):
    """Files to write, and words of the error."""

    prepare: Callable[[Path], object]
    says: tuple[str, ...]
    written: int = 0


def volume(name: str, change: Callable[[np.ndarray], np.ndarray] = lambda values: values) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        values, affine = torso()
        write_volume(folder / name, change(values), affine)

    return write


def several(*steps: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [step(folder) for step in steps]


def holed(values: np.ndarray) -> np.ndarray:
    changed = values.astype(np.float32)
    changed[3, 2, 1] = np.nan
    return changed


def cut_off(folder: Path) -> None:
    volume("b.nii.gz")(folder)
    content = (folder / "b.nii.gz").read_bytes()
    (folder / "b.nii.gz").write_bytes(content[: len(content) // 2])


def endless(folder: Path) -> None:
    """A header of a volume that no memory holds."""
    header = nib.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape((30000, 30000, 30000))
    header.set_sform(np.eye(4), 1)
    (folder / "b.nii.gz").write_bytes(gzip.compress(header.binaryblock + bytes(4)))


def picture(folder: Path) -> None:
    from PIL import Image

    Image.new("L", (20, 20)).save(folder / "p.png")


BAD = {
    "a picture": Bad(picture, ("p.png is an image, and the model learned from volumes", "readable: .nii.gz")),
    "nothing": Bad(lambda folder: (folder / "readme.txt").touch(), ("no volumes found in", "looked for .nii.gz")),
    "NaN": Bad(
        several(volume("a.nii.gz"), volume("b.nii.gz", holed)),
        ("b.nii.gz has NaN or infinite voxels: 1 of 24576, the first at slice 1, row 2, column 3", "1 of 2 volumes"),
        1,
    ),
    "truncated gzip": Bad(
        several(volume("a.nii.gz"), cut_off), ("b.nii.gz is not a readable volume", "; 1 of 2 volumes are written"), 1
    ),
    "larger than memory": Bad(endless, ("b.nii.gz needs", "GB of memory (30000×30000×30000 voxels)", "0 of 1 volumes")),
    "two channels": Bad(
        several(volume("a_0000.nii.gz"), volume("a_0001.nii.gz")),
        ("case 'a' has 2 channels (a_0000.nii.gz, a_0001.nii.gz), and the model takes 1",),
    ),
    "a missing channel": Bad(
        several(volume("a_0000.nii.gz"), volume("a_0002.nii.gz")), ("case 'a' has no file of channel 1", "add a_0001")
    ),
    "one name": Bad(
        several(volume("a.nii.gz"), volume("a_0000.nii.gz")), ("would both be written as a.nii.gz", "rename one")
    ),
    "4D": Bad(
        volume("a.nii.gz", lambda values: np.stack([values, values], -1)),
        ("a.nii.gz has 2 volumes (4 axes)", "0 of 1 volumes are written"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_volumes_are_plain_lines(name: str, model: Trained, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    bad = BAD[name]
    bad.prepare(tmp_path / "in")
    with pytest.raises(DataError) as told:
        predict_files(model, [tmp_path / "in"], tmp_path / "out", lambda *_: None)
    for words in bad.says:
        assert words in f"{told.value.what} {told.value.hint}"
    inside = [p.name for p in (tmp_path / "out").glob("*")] if (tmp_path / "out").exists() else []
    assert sorted(inside) == (["a.nii.gz", "classes.json"] if bad.written else [])


def test_a_volume_that_fits_only_as_it_is_read(model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume("a.nii.gz")(tmp_path)
    monkeypatch.setattr("perdure.predict.free_memory", lambda: 1 << 20)
    with pytest.raises(DataError, match=r"'a' \(32×32×24 voxels\) needs 0\.0 GB of memory at the spacing of the model"):
        predict_files(model, [tmp_path], tmp_path / "out", lambda *_: None)
    assert not (tmp_path / "out").exists()


def test_inputs_are_not_overwritten(model: Trained, tmp_path: Path) -> None:
    volume("a.nii.gz")(tmp_path)
    before = (tmp_path / "a.nii.gz").read_bytes()
    with pytest.raises(DataError, match=r"the label map of .*a\.nii\.gz would replace it"):
        predict_files(model, [tmp_path], tmp_path, lambda *_: None)
    assert (tmp_path / "a.nii.gz").read_bytes() == before
    (tmp_path / "a.nii.gz").rename(tmp_path / "a_0000.nii.gz")
    with pytest.raises(DataError, match=r"would lie among the scans, such as a_0000\.nii\.gz"):
        predict_files(model, [tmp_path], tmp_path, lambda *_: None)
    assert [file.name for file in tmp_path.iterdir()] == ["a_0000.nii.gz"]


def test_a_recipe_beside_the_masks_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mine")
    refuse_run_folder(tmp_path / "masks")
    (tmp_path / "stream.json").write_text("{}")
    with pytest.raises(UsageError, match="lies in the run folder"):
        refuse_run_folder(tmp_path / "masks")


@pytest.mark.parametrize("place", [".", "masks"])
def test_masks_do_not_lie_in_a_run_folder(star_run: Path, tmp_path: Path, cli: Callable[..., Any], place: str) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "p.png")
    before = sorted(star_run.rglob("*"))
    done = cli("predict", star_run, "-i", tmp_path / "p.png", "-o", star_run / place)
    assert done.code == 2 and "lies in the run folder" in done.err and "-o DIR" in done.err
    assert sorted(star_run.rglob("*")) == before


def test_a_model_of_photographs_refuses_volumes(star_run: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    volume("a.nii.gz")(tmp_path)
    done = cli("predict", star_run, "-i", tmp_path / "a.nii.gz", "-o", tmp_path / "out")
    assert done.code == 1 and "a.nii.gz is a volume, and the model learned from photographs" in done.err
    with pytest.raises(DataError, match="is a volume"):
        cases_of_run(star_run, [tmp_path])


def test_channels_are_found_by_their_numbers(tmp_path: Path) -> None:
    names = ["a_0000.nii.gz", "a_0001.nii.gz", "b_2023.nii.gz", "c.mhd", "d.MHA"]
    for name in names:
        (tmp_path / name).touch()
    found = {case.name: case for case in find_cases([tmp_path], ENDINGS, (2,))}
    assert found["a"] == Input("a", (tmp_path / names[0], tmp_path / names[1]), ".nii.gz")
    assert found["b_2023"].target == "b_2023.nii.gz"
    assert (found["c"].target, found["d"].target) == ("c.mha", "d.mha")


def test_images_are_shown_as_those_of_the_newest_task_or_of_the_one_that_is_named(
    volume_run: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    write_volume(tmp_path / "in/a.nii.gz", *torso())
    words = ("-i", tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu")
    same = cli("predict", volume_run, *words)
    assert (same.code, "note" in same.err) == (0, False), same.err  # all tasks have one preparation

    run = tmp_path / "run"
    shutil.copytree(volume_run, run)
    described = json.loads((run / "stream.json").read_text())
    described["tasks"][0]["preparation"]["spacing"] = [20, 16, 16]  # as with volumes.plan: per_task
    (run / "stream.json").write_text(json.dumps(described))
    newest = (12.0, 10.0, 10.0)
    shown = {task: Trained.open(run, "cpu", task=task).preparation for task in ("", "vessels", "2", "organs", "1")}
    spacings = [plan.spacing for plan in shown.values() if isinstance(plan, Volume3D)]
    assert spacings == [newest, newest, newest, (20.0, 16.0, 16.0), (20.0, 16.0, 16.0)]
    told = cli("predict", run, *words)
    assert told.code == 0 and told.err.startswith("note: each task has a preparation of its own; ")
    assert "as those of 'vessels', the newest task" in told.err.splitlines()[0]
    asked = cli("predict", run, *words, "--task", "organs")
    assert (asked.code, "note" in asked.err) == (0, False), asked.err
    for name in ("vesels", "3", "0"):
        wrong = cli("predict", run, *words, "--task", name)
        assert wrong.code == 2 and f"--task {name}: the run has learned no such task" in wrong.err
    assert "did you mean 'vessels'?" in cli("predict", run, *words, "--task", "vesels").err
