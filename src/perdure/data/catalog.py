"""The data sets that Perdure reads. The table imports nothing; a reader is imported when its data set is opened."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from perdure.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from perdure.data.source import Source


class Entry(NamedTuple):
    """Where a reader lives and what it reads, for ``perdure list datasets``.

    ``layout`` is what the folder must hold, in a few words; empty for built-in data. ``notes`` tells the licence of
    the data as its authors state it: Perdure ships none of it.
    """

    target: str
    summary: str
    layout: str
    notes: str


DATASETS: Final[dict[str, Entry]] = {
    "digits": Entry(
        "perdure.data.readers.digits:open_digits",
        "built-in scenes of handwritten digits on textured ground, 10 classes, made on the fly",
        "",
        "UCI handwritten digits (CC BY 4.0), shipped with scikit-learn",
    ),
    "single_digits": Entry(
        "perdure.data.readers.single_digits:open_single_digits",
        "built-in handwritten digits, one an image, for classification, 10 classes",
        "",
        "UCI handwritten digits (CC BY 4.0), shipped with scikit-learn",
    ),
    "medmnist": Entry(
        "perdure.data.readers.medmnist:open_medmnist",
        "MedMNIST's 2D sets for classification, 28 to 224 pixels; any other .npz file in their layout",
        "FLAG.npz or FLAG_64.npz (or _128, _224)",
        "CC BY 4.0, dermamnist CC BY-NC 4.0; not for clinical use",
    ),
    "class_folders": Entry(
        "perdure.data.readers.class_folders:open_class_folders",
        "your own images for classification in one folder a class",
        "train/CLASS/, test/CLASS/ (and val/CLASS/, classes.txt)",
        "yours",
    ),
    "voc": Entry(
        "perdure.data.readers.voc:open_voc",
        "PASCAL VOC 2012, also augmented, 20 classes; other data in its layout that has a classes.txt",
        "JPEGImages/, SegmentationClass/, ImageSets/Segmentation/ (also inside VOCdevkit/VOC2012/)",
        "Flickr terms of use; research",
    ),
    "ade20k": Entry(
        "perdure.data.readers.ade20k:open_ade20k",
        "ADE20K scene parsing (ADEChallengeData2016), 150 classes",
        "images/{training,validation}/, annotations/{training,validation}/",
        "annotations BSD-3-Clause; images for non-commercial research",
    ),
    "cityscapes": Entry(
        "perdure.data.readers.cityscapes:open_cityscapes",
        "Cityscapes fine annotations, 19 classes",
        "leftImg8bit/{train,val}/CITY/, gtFine/{train,val}/CITY/",
        "Cityscapes licence; non-commercial, registration needed",
    ),
    "camvid": Entry(
        "perdure.data.readers.camvid:open_camvid",
        "CamVid road scenes, SegNet release, 11 classes",
        "{train,val,test}.txt, {train,val,test}/, {train,val,test}annot/",
        "research; see the University of Cambridge's page",
    ),
    "folders": Entry(
        "perdure.data.readers.folders:open_folders",
        "your own images and masks in plain folders with a class file",
        "images/, masks/, classes.txt, train.txt, test.txt (or train/images/, train/masks/, ...)",
        "yours",
    ),
}


def open_source(name: str, root: Path | None, options: Mapping[str, object] | None = None) -> Source:
    """Open a data set by its name in :data:`DATASETS`.

    Args:
        name: Key of :data:`DATASETS`.
        root: Folder of the data; ``None`` for built-in data.
        options: Keyword arguments of the reader.

    Raises:
        UsageError: Unknown data set or option, an option of a wrong type, or a folder given to built-in data.
        DataError: The folder is missing or has another layout.
    """
    from pydantic import TypeAdapter, ValidationError  # not above: the command line lists data sets without it

    if name not in DATASETS:
        raise UsageError(f"unknown data set '{name}'", nearest(name, DATASETS))
    entry = DATASETS[name]
    if entry.layout and root is None:
        raise UsageError(f"the data set '{name}' needs a folder", f"give the folder that holds {entry.layout}")
    if not entry.layout and root is not None:
        raise UsageError(
            f"the data set '{name}' is built in and reads no folder, but {root} was given", "leave the folder out"
        )
    if root is not None and not root.is_dir():
        missing = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"the folder {root} {missing}", f"'{name}' expects a folder with {entry.layout}")
    opener = pkgutil.resolve_name(entry.target)
    # options are checked against the opener's own signature, so that a reader states them in one place only
    known = {
        key: p.annotation for key, p in inspect.signature(opener, eval_str=True).parameters.items() if key != "root"
    }
    checked: dict[str, object] = {}
    for key, value in (options or {}).items():
        if key not in known:
            hint = nearest(key, known) if known else "it has no options"
            raise UsageError(f"the data set '{name}' has no option '{key}'", hint)
        try:
            checked[key] = TypeAdapter(known[key]).validate_python(value)
        except ValidationError as error:
            raise UsageError(f"option '{key}' of data set '{name}' is {value!r}: {error.errors()[0]['msg']}") from error
    source: Source = opener(**checked) if root is None else opener(root, **checked)
    return source
