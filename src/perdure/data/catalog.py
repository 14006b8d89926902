"""The data sets that Perdure reads. The table imports nothing; a reader is imported when its data set is opened."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from perdure.errors import DataError, PerdureError, UsageError, nearest
from perdure.foreign import is_foreign, load

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
    "phantoms": Entry(
        "perdure.data.readers.phantoms:open_phantoms",
        "built-in look-alikes of medical images, made on the fly: torso CT in 3D in three partly labelled sets, "
        "slices of heart, eye and prostate in 2D",
        "",
        "drawn from formulas, no patient's data",
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
    "nnunet": Entry(
        "perdure.data.readers.nnunet:open_nnunet",
        "your own volumes (or images) in the raw layout of nnU-Net v2",
        "dataset.json, imagesTr/, labelsTr/ (and imagesTs/, labelsTs/)",
        "yours",
    ),
    "decathlon": Entry(
        "perdure.data.readers.decathlon:open_decathlon",
        "volumes in the layout of the Medical Segmentation Decathlon (nnU-Net v1)",
        "dataset.json, imagesTr/, labelsTr/",
        "yours; the Decathlon's own CC BY-SA 4.0",
    ),
    "nifti_folders": Entry(
        "perdure.data.readers.nifti_folders:open_nifti_folders",
        "your own volumes and masks (.nii.gz, .nii, .mha, .mhd, .nrrd) in plain folders with a class file",
        "images/, labels/, classes.txt (and train.txt, test.txt)",
        "yours",
    ),
    "h5_volumes": Entry(
        "perdure.data.readers.h5_volumes:open_h5_volumes",
        "volumes in HDF5 files with the keys image and label",
        "*.h5 or DIR/*.h5 (and train.list, test.list)",
        "yours",
    ),
    "mnms": Entry(
        "perdure.data.readers.mnms:open_mnms",
        "M&Ms, cardiac MR of several vendors: end-diastole and end-systole, 3 classes",
        "*.csv, .../CODE/CODE_sa.nii.gz, CODE_sa_gt.nii.gz",
        "the challenge's terms of use; registration needed",
    ),
    "fundus_sites": Entry(
        "perdure.data.readers.fundus_sites:open_fundus_sites",
        "fundus photographs of four sites as published with DoFE, optic cup and disc",
        "Domain1/{train,test}/ROIs/{image,mask}/, Domain2/, ...",
        "see the original data sets: Drishti-GS, RIM-ONE, REFUGE",
    ),
    "prostate_sites": Entry(
        "perdure.data.readers.prostate_sites:open_prostate_sites",
        "prostate MR of six sites as published with MS-Net and its extension",
        "SITE/CaseNN.nii.gz, SITE/CaseNN_segmentation.nii.gz",
        "see the original data sets: NCI-ISBI 2013, I2CVB, PROMISE12",
    ),
}


def needs_folder(name: str) -> bool:
    """Whether a data set of :data:`DATASETS` is read from a folder; False for built-in data and unknown names."""
    return name in DATASETS and bool(DATASETS[name].layout)


HELD_OUT: Final = "validation"
"""Option of every data set: see :func:`perdure.data.validation.hold_out`."""


def open_source(name: str, root: Path | None, options: Mapping[str, object] | None = None) -> Source:
    """Open a data set by its name in :data:`DATASETS`, or by ``package.module:function`` with a reader of one's own.

    A reader is a function that returns a :class:`~perdure.data.source.Source`. Its keyword arguments are the data set's
    options, with type hints by which they are checked; ``root``, if it has one, is the folder.

    Args:
        name: Key of :data:`DATASETS`, or the place of a function.
        root: Folder of the data; ``None`` for built-in data.
        options: Keyword arguments of the reader, and ``validation``.

    Raises:
        UsageError: Unknown data set or option, an option of a wrong type, a folder given to data that needs none, or a
            reader of one's own that cannot be imported or fails.
        DataError: The folder is missing or has another layout.
    """
    if not is_foreign(name) and name not in DATASETS:
        raise UsageError(f"unknown data set '{name}'", f"{nearest(name, DATASETS)}, or write package.module:function")
    layout = DATASETS[name].layout if name in DATASETS else ""
    opener: Any = pkgutil.resolve_name(DATASETS[name].target) if name in DATASETS else load(name, "reader")
    known = _options(name, opener)
    needs_root = name in DATASETS and bool(layout)
    takes_root = needs_root
    if name not in DATASETS:
        takes_root = "root" in known
        needs_root = takes_root and known["root"].default is inspect.Parameter.empty
    if needs_root and root is None:
        raise UsageError(
            f"the data set '{name}' needs a folder", f"give the folder that holds {layout or 'its files'}: data.root"
        )
    if not takes_root and root is not None:
        raise UsageError(
            f"the data set '{name}' is built in and reads no folder, but {root} was given", "leave the folder out"
        )
    if root is not None and not root.is_dir():
        missing = "is not a folder" if root.exists() else "does not exist"
        raise DataError(
            f"the folder {root} {missing}", f"'{name}' expects a folder with {layout}" if layout else "check the path"
        )
    checked = _checked(name, {k: p.annotation for k, p in known.items() if k != "root"}, options or {})
    every = checked.pop(HELD_OUT, None)
    source = _opened(name, opener, checked if root is None else {"root": root, **checked})
    if every is None:
        return source

    from perdure.data.validation import hold_out

    return hold_out(source, every)


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Check the options of a data set of :data:`DATASETS` without opening it; a reader of one's own is not imported.

    Raises:
        UsageError: There is no such option, or one is of a wrong type.
    """
    if name in DATASETS:
        known = _options(name, pkgutil.resolve_name(DATASETS[name].target))
        _checked(name, {k: p.annotation for k, p in known.items() if k != "root"}, options)


def _options(name: str, opener: Any) -> dict[str, inspect.Parameter]:
    """Parameters of a reader: options are checked against its own signature, so that they are stated in one place."""
    try:
        return dict(inspect.signature(opener, eval_str=True).parameters)
    except (TypeError, NameError, ValueError, AttributeError) as error:
        raise UsageError(
            f"'{name}' is not a reader: {error}", "a reader is a function with type hints that exist when it is called"
        ) from error


def _checked(name: str, known: Mapping[str, object], options: Mapping[str, object]) -> dict[str, Any]:
    """Options with the types that the reader asks for."""
    from pydantic import TypeAdapter, ValidationError  # not above: the command line lists data sets without it
    from pydantic.errors import PydanticSchemaGenerationError

    kinds: dict[str, Any] = {HELD_OUT: int, **known}
    checked: dict[str, Any] = {}
    for key, value in options.items():
        if key not in kinds:
            raise UsageError(f"the data set '{name}' has no option '{key}'", nearest(key, kinds))
        kind = Any if kinds[key] is inspect.Parameter.empty else kinds[key]
        try:
            checked[key] = TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            # YAML reads {128:1} as a key of base 60, or as a text, with no value
            spaceless = isinstance(value, dict) and None in value.values()
            raise UsageError(
                f"option '{key}' of data set '{name}' is {value!r}: {error.errors()[0]['msg']}",
                "write a space after each colon: {128: 1}" if spaceless else "",
            ) from error
        except PydanticSchemaGenerationError as error:
            raise UsageError(
                f"option '{key}' of data set '{name}' has the type {kind}, which no recipe can hold",
                "use numbers, texts, lists, mappings or Path",
            ) from error
    return checked


def _opened(name: str, opener: Any, arguments: Mapping[str, Any]) -> Source:
    """What a reader returns; a failure of a reader of one's own is told as such."""
    from perdure.data.source import Source

    try:
        source = opener(**arguments)
    except (PerdureError, MemoryError):
        raise
    except Exception as error:
        if name in DATASETS:
            raise
        raise UsageError(
            f"the reader '{name}' failed: {type(error).__name__}: {error}", "--debug shows where"
        ) from error
    if not isinstance(source, Source):
        raise UsageError(
            f"the reader '{name}' returned a {type(source).__name__}, not a Source",
            "derive a class from perdure.data.source.Source, see docs/adding-your-data.md",
        )
    return source
