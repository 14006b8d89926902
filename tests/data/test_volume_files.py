"""Volumes of any orientation are read alike, and what is written lies where the file lay."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest

from perdure.data.volumes.files import companions, read_header, read_image, read_voxels, write_volume
from perdure.data.volumes.headers import difference, place, turn_back
from perdure.errors import DataError, UsageError
from perdure.outputs.volumes import write_label_volume

nib = pytest.importorskip("nibabel")
sitk = pytest.importorskip("SimpleITK")

SPACING = np.array([0.5, 0.75, 2.0])
ORIENTATIONS = ["RAS", "LPS", "LAS", "RPI", "SAR", "ASL", "PIR", "IPL"]
ENDINGS = [".nii.gz", ".nii", ".mha", ".nrrd"]


def canonical() -> tuple[np.ndarray, np.ndarray]:
    """A volume in RAS and its affine: axes at a slant, as of a tilted head."""
    values = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    turn = np.array([[0.96, -0.28, 0.0], [0.28, 0.96, 0.0], [0.0, 0.0, 1.0]])
    affine = np.eye(4)
    affine[:3, :3] = turn * SPACING
    affine[:3, 3] = -12.34567, 8.9, 101.0625
    return values, affine


def oriented(codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The same volume with its axes in another order and sense."""
    values, affine = canonical()
    image = nib.Nifti1Image(values, affine)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))
    return np.asanyarray(turned.dataobj), turned.affine


def affine_of_itk(path: Path) -> np.ndarray:
    image = sitk.ReadImage(str(path))
    lps = np.eye(4)
    lps[:3, :3] = np.asarray(image.GetDirection()).reshape(3, 3) * np.asarray(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


@pytest.mark.parametrize(("codes", "ending"), itertools.product(ORIENTATIONS, ENDINGS))
def test_every_orientation_is_read_alike(tmp_path: Path, codes: str, ending: str) -> None:
    values, affine = oriented(codes)
    path = tmp_path / f"x{ending}"
    write_volume(path, values, affine)
    header = read_header(path)
    assert header.orientation == codes and header.size == values.shape
    image = read_image(header)
    assert image.dtype == np.float32 and image.flags.c_contiguous
    # axis 0 to superior, 1 to anterior, 2 to the right
    np.testing.assert_array_equal(image[0], canonical()[0].transpose(2, 1, 0))
    np.testing.assert_allclose(header.geometry.spacing, SPACING[::-1], rtol=1e-6)
    assert header.geometry.unit == "mm"
    np.testing.assert_allclose(np.reshape(header.geometry.affine, (4, 4)), affine, atol=1e-5)
    np.testing.assert_array_equal(turn_back(image[0], header.geometry), values)


@pytest.mark.parametrize(("codes", "ending"), itertools.product(ORIENTATIONS, ENDINGS))
def test_a_label_map_lies_where_the_file_lay(tmp_path: Path, codes: str, ending: str) -> None:
    values, affine = oriented(codes)
    write_volume(tmp_path / f"x{ending}", values, affine)
    header = read_header(tmp_path / f"x{ending}")
    labels = (read_voxels(header) % 3).astype(np.int16)
    written = write_label_volume(tmp_path / "out", "y", labels, header.geometry, ending)
    assert written == tmp_path / "out" / f"y{ending}"
    stored = np.reshape(header.geometry.affine, (4, 4))
    np.testing.assert_allclose(affine_of_itk(written), stored, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(written))).transpose(2, 1, 0), values % 3)
    if ending.startswith(".nii"):
        image = nib.load(written)
        np.testing.assert_allclose(image.affine, stored, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(image.get_qform(), stored, rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(np.asanyarray(image.dataobj), values % 3)
        assert image.get_data_dtype() == np.int16


def test_bytes_are_reproducible(tmp_path: Path) -> None:
    values, affine = oriented("LPS")
    write_volume(tmp_path / "x.nii.gz", values, affine)
    geometry = read_header(tmp_path / "x.nii.gz").geometry
    labels = np.ones((7, 6, 5), np.int16)
    first = write_label_volume(tmp_path, "a", labels, geometry)
    again = write_label_volume(tmp_path / "again", "a", labels, geometry)
    assert again.read_bytes() == first.read_bytes()
    assert write_label_volume(tmp_path, "c", labels, geometry, ".mhd").name == "c.mha"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".part-")]


def test_scaled_and_unsigned_values_are_those_of_nibabel(tmp_path: Path) -> None:
    values, affine = oriented("ASL")
    image = nib.Nifti1Image(values.astype(np.int16), affine)
    image.header.set_slope_inter(0.5, -1024)
    nib.save(image, tmp_path / "x.nii.gz")
    header = read_header(tmp_path / "x.nii.gz")
    expected = nib.load(tmp_path / "x.nii.gz").get_fdata().astype(np.float32)
    np.testing.assert_array_equal(turn_back(read_image(header)[0], header.geometry), expected)


def test_places_are_compared_in_the_world(tmp_path: Path) -> None:
    headers = {}
    for codes in ("RAS", "LPS", "SAR"):
        write_volume(tmp_path / f"{codes}.nii.gz", *oriented(codes))
        headers[codes] = read_header(tmp_path / f"{codes}.nii.gz")
    for other in ("LPS", "SAR"):
        assert difference(headers["RAS"], headers[other]) == ""
        np.testing.assert_allclose(place(headers["RAS"]), place(headers[other]), atol=1e-4)
    values, affine = oriented("RAS")
    rounded = np.round(affine, 3)
    write_volume(tmp_path / "rounded.nii.gz", values, rounded)
    assert difference(headers["RAS"], read_header(tmp_path / "rounded.nii.gz")) == ""


def test_the_voxels_of_a_header_file_belong_to_it(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "x.mhd"))
    assert companions(tmp_path / "x.mhd") == [tmp_path / "x.mhd", tmp_path / "x.raw"]
    np.testing.assert_array_equal(read_voxels(read_header(tmp_path / "x.mhd")), values[:, ::-1, ::-1])
    assert companions(tmp_path / "y.nii.gz") == [tmp_path / "y.nii.gz"]
    with pytest.raises(UsageError, match="not written in this format"):
        write_volume(tmp_path / "y.mhd", values, np.eye(4))


def nnunet_folders(shared: Path) -> list[Path]:
    return [
        shared / "hippocampus" / "nnUNet_raw" / "Dataset004_Hippocampus",
        shared / "prostate" / "nnUNet_raw" / "Dataset105_ProstateMR",
    ]


@pytest.mark.real
def test_arrays_are_those_of_nnunet(shared_data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("nnunetv2")
    from nnunetv2.imageio.nibabel_reader_writer import NibabelIOWithReorient

    from perdure.data.catalog import open_source

    reader = NibabelIOWithReorient()
    for root in nnunet_folders(shared_data):
        source = open_source("nnunet", root)
        for split in ("train", "test"):
            for name in source.names(split):
                image, told = reader.read_images([str(root / "imagesTr" / f"{name}_0000.nii.gz")])
                mask, _ = reader.read_seg(str(root / "labelsTr" / f"{name}.nii.gz"))
                case = source.read(split, name)
                assert np.array_equal(case.image.numpy(), image) and case.image.numpy().dtype == image.dtype
                assert np.array_equal(case.label.numpy(), mask[0])
                assert case.geometry.spacing == pytest.approx(told["spacing"], rel=1e-6)
    # of another orientation than RAS
    path = shared_data / "ct_totalseg" / "example_mr_sm.nii.gz"
    assert read_header(path).orientation == "LPS"
    np.testing.assert_array_equal(read_image(read_header(path)), reader.read_images([str(path)])[0])


def test_an_archive_is_read_once_and_to_its_check_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, affine = oriented("RAS")
    path = tmp_path / "x.nii.gz"
    write_volume(path, values, affine)
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # the check sum
    (tmp_path / "bad.nii.gz").write_bytes(content)
    header, bad = read_header(path), read_header(tmp_path / "bad.nii.gz")
    opened: list[object] = []
    real = gzip.open
    monkeypatch.setattr(gzip, "open", lambda *a, **k: opened.append(a) or real(*a, **k))
    assert read_voxels(header).shape == header.turned
    assert len(opened) == 1
    with pytest.raises(DataError, match="is not a readable volume: CRC check failed"):
        read_voxels(bad)
