"""The schema of a recipe. Reading and checking one needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from perdure.data.volumes.options import VolumeOptions
from perdure.engine.options import EngineOptions
from perdure.errors import odd, plain
from perdure.files import home
from perdure.kept.ledger import MIN_IMAGES
from perdure.methods.options import Options, TrainingOptions


def refused_if_odd(value: str) -> str:
    """A text that people read. Raises ValueError where it holds what commands a terminal or cannot be seen."""
    if wrong := next(filter(odd, value.replace("\n", " ")), ""):
        raise ValueError(f"holds the control character {plain(wrong)}")
    return value


class OpenOptions(BaseModel):
    """Section with a name whose further keys are the settings of what is named."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def settings(self) -> dict[str, JsonValue]:
        """The further keys."""
        return dict(self.model_extra or {})


class DataSection(OpenOptions):
    """Where samples come from; further keys are settings of the data set (`perdure list datasets`)."""

    name: str = Field(
        description="a data set of `perdure list datasets`, or package.module:function, a reader of one's own"
    )
    root: Path | None = Field(None, description="folder of the data; not written into the run folder")
    validation: int | None = Field(
        None,
        ge=2,
        description="for data without a validation set: every n-th training image, of the sorted names, is for "
        "validation and not for training",
    )

    @field_validator("root")
    @classmethod
    def _home(cls, root: Path | None) -> Path | None:
        """`~/data` in a recipe or an override, where no shell expands it."""
        return None if root is None else home(root)


class StreamSection(Options):
    """How one data set becomes tasks."""

    kind: Literal["class_incremental"] = Field(
        "class_incremental", description="one data set, its classes learned in steps"
    )
    base: int = Field(ge=1, description="classes of the first task")
    step: int = Field(ge=1, description="classes of every later task")
    short_last: bool = Field(False, description="the last task may teach fewer classes than step")
    setting: Literal["overlap", "disjoint", "partition", "partition-rarest"] = Field(
        "overlap",
        description="which images a task holds: with a new class (overlap), without later classes (disjoint), "
        "each in one task by a file (partition) or by its rarest class (partition-rarest); all the same where an "
        "image has one class",
    )
    order: Literal["natural", "shuffled"] | tuple[int | str, ...] = Field(
        "natural", description="class order: natural, shuffled (by the seed), or a list of names or ids"
    )
    partition_file: Path | None = Field(
        None, description="setting=partition: .npy matrix (images x tasks) or text lines NAME TASK"
    )
    pool: Literal["val", "test", "folder"] | None = Field(
        None,
        description="images that a method may use unlabelled: those of seen classes in val or test, or all of "
        "pool_folder; test makes figures transductive",
    )
    pool_folder: Path | None = Field(None, description="pool=folder: images without labels, in folders or not")


class TaskSection(Options):
    """One data set of a stream of data sets."""

    data: DataSection = Field(description="the data set, as in the section data of other recipes")
    name: str = Field("", description="of the task and of its folder; by default the data set's name")
    classes: tuple[str, ...] | None = Field(
        None, description="classes of the data set that it annotates, in learning order; null: all of them"
    )
    rename: dict[str, str] = Field(
        default_factory=dict, description="names of classes in the data set: their names in the model"
    )
    annotated: tuple[str, ...] = Field(
        (),
        description="further classes of the model, by name, that its images cannot show: their background is known "
        "to be none of these",
    )

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        """It is shown in terminals and pages."""
        return refused_if_odd(value)

    @field_validator("data", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        """`data: phantoms` is short for `data: {name: phantoms}`."""
        return {"name": value} if isinstance(value, str) else value


class DataSetsSection(Options):
    """Data sets that arrive one after another: each is a task, and annotates only some of the classes."""

    kind: Literal["data_sets"] = Field(description="a task for every data set")
    root: Path | None = Field(
        None, description="folder that the data.root of tasks start from; not written into the run folder"
    )
    tasks: tuple[TaskSection, ...] = Field(
        (),
        description="the data sets, or none where --data names them; stream.tasks.2.data.root=DIR is the folder "
        "of the second",
    )
    order: Literal["natural", "reversed", "shuffled"] | tuple[str, ...] = Field(
        "natural", description="order of the tasks: as listed, reversed, shuffled (by the seed), or a list of names"
    )
    union: Literal["names", "offset"] = Field(
        "names",
        description="names: classes of one name are one class, in whatever data sets; offset: every data set has "
        "classes of its own, with its name before theirs",
    )
    elsewhere: Literal["unlabelled", "absent"] = Field(
        "unlabelled",
        description="what a pixel that a data set labels as background may be: a class of another data set "
        "(unlabelled), or nothing (absent)",
    )

    @field_validator("root")
    @classmethod
    def _home(cls, root: Path | None) -> Path | None:
        return None if root is None else home(root)


class NetworkSection(OpenOptions):
    """The network; further keys are settings of the builder (`perdure.networks.build`)."""

    name: str = Field("deeplab", description="a network of `perdure list networks`, or package.module:function")


class AugmentSection(Options):
    """Training augmentation and normalisation (spec of STAR, 1.5; of CCSI, 1.2)."""

    crop: int = Field(
        512,
        ge=8,
        le=1 << 16,
        description="side of the training crop in pixels, a multiple of the network's stride; in classification the "
        "side to which every image is padded with black or scaled",
    )
    area: tuple[float, float] = Field((0.5, 2.0), description="segmentation: crop area as a share of the image's")
    short_edges: tuple[Annotated[int, Field(ge=8, le=1 << 16)], ...] = Field(
        (),
        description="segmentation: scale the shorter side to one of these lengths, each as likely, and the longer one "
        "to at most 2048, and cut the crop from that (CLIP-CISS) instead of a box of random area; what is smaller than "
        "the crop is filled up with grey and with ignored pixels",
    )
    jitter: bool = Field(
        False, description="segmentation: change brightness, contrast, saturation and hue at random (as in SSD)"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    mean: tuple[float, ...] = Field(
        (0.485, 0.456, 0.406), max_length=64, description="subtracted from each channel (0 to 1)"
    )
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), max_length=64, description="each channel is divided by it")


class EvaluateSection(Options):
    """What is measured, and how those images, and images to predict, are shown to the model."""

    split: Literal["test", "val"] = Field(
        "test",
        description="images that all figures, counts and sample pictures come from; val: settings are chosen without a "
        "look at test images, and every page says so",
    )
    protocol: Literal["whole", "centre_crop", "scaled"] = Field(
        "whole",
        description="segmentation: what is measured: whole images at their own size, the centre size × size after "
        "scaling (published by STAR), or whole images and masks after scaling (scaled, published by CLIP-CISS)",
    )
    size: int | None = Field(
        None,
        ge=8,
        le=1 << 16,
        description="segmentation: scale the shorter side to so many pixels first; null: as images are",
    )
    window: int | None = Field(
        1024,
        ge=8,
        le=1 << 16,
        description="segmentation: larger images are predicted in overlapping windows of this side",
    )
    overlap: float = Field(1 / 3, ge=0, le=0.95, description="share of a window that its neighbour covers again")
    blend: Literal["average", "centre"] = Field(
        "average",
        description="where windows overlap: average their scores, or take the class from the window in whose middle a "
        "pixel lies most, which is faster where there are many classes",
    )
    batch_size: int = Field(1, ge=1, description="most test images per forward pass; those of one size go together")
    tolerance: float = Field(
        2.0,
        gt=0,
        le=1000,
        description="images with a spacing in mm: surfaces so far apart, in mm, agree (surface Dice)",
    )

    @model_validator(mode="after")
    def _crop_has_a_size(self) -> EvaluateSection:
        if self.protocol != "whole" and self.size is None:
            raise ValueError(f"protocol {self.protocol} needs evaluate.size, what the shorter side is scaled to")
        return self


class MethodSection(OpenOptions):
    """The method; further keys are its own options (`perdure list methods`)."""

    name: str = Field(description="a method of `perdure list methods`, or package.module:Class")


class ReportSection(Options):
    """What the report shows."""

    samples: int = Field(6, ge=0, description="test images shown with the prediction after every task; 0 for none")
    patient_samples: bool = Field(False, description="show test images of patient data too (the audit will then fail)")


class PrivacySection(Options):
    """What may be kept of patients."""

    min_images: int = Field(
        MIN_IMAGES,
        ge=5,
        description="data of patients: statistics that look like images, such as class means, are kept only of classes "
        "with at least so many training images; the ledger shows it",
    )


class Recipe(Options):
    """One experiment."""

    name: str = Field(description="name of the recipe")
    about: str = Field("", max_length=500, description="one sentence")
    seed: int = Field(1, ge=0, lt=1 << 63, description="seed of everything random")
    data: DataSection | None = Field(None, description="the data set; not where the stream has several")
    stream: Annotated[StreamSection | DataSetsSection, Field(discriminator="kind")]
    network: NetworkSection = NetworkSection()
    augment: AugmentSection = AugmentSection()
    volumes: VolumeOptions = VolumeOptions()
    evaluate: EvaluateSection = EvaluateSection()
    method: MethodSection
    training: TrainingOptions = TrainingOptions()
    engine: EngineOptions = EngineOptions()
    privacy: PrivacySection = PrivacySection()
    report: ReportSection = ReportSection()

    @field_validator("name", "about")
    @classmethod
    def _plain(cls, value: str) -> str:
        """Both are shown in terminals and pages."""
        return refused_if_odd(value)

    @field_validator("name")
    @classmethod
    def _short(cls, value: str) -> str:
        """The run folder has this name by default, and file systems have a limit of 255 bytes."""
        if len(value.encode()) > 100:
            raise ValueError(f"has {len(value.encode())} bytes, and 100 are the most")
        return value

    @field_validator("stream", mode="before")
    @classmethod
    def _usual_kind(cls, value: object) -> object:
        """A stream without a kind is class-incremental, as most recipes are."""
        return {"kind": "class_incremental", **value} if isinstance(value, dict) else value

    @field_validator("method", "network", "data", mode="before")
    @classmethod
    def _name_alone(cls, value: object) -> object:
        """`method: star` is short for `method: {name: star}`."""
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _data_of_the_stream(self) -> Recipe:
        if self.stream.kind == "data_sets" and self.data is not None:
            raise ValueError("data is for one data set; those of this stream stand under stream.tasks")
        if self.stream.kind == "class_incremental" and self.data is None:
            raise ValueError("the key 'data' is missing: name a data set of `perdure list datasets`")
        return self

    @property
    def sets(self) -> tuple[DataSection, ...]:
        """The data sets of all tasks, as the recipe lists them."""
        if isinstance(self.stream, DataSetsSection):
            return tuple(task.data for task in self.stream.tasks)
        assert self.data is not None
        return (self.data,)

    @model_validator(mode="after")
    def _same_length(self) -> Recipe:
        if len(self.augment.mean) != len(self.augment.std):
            raise ValueError("augment.mean and augment.std must have the same length")
        if not self.augment.mean:
            raise ValueError("augment.mean and augment.std need one number per channel")
        if min(self.augment.std) <= 0:
            raise ValueError("augment.std must be above 0")
        if not 0 < self.augment.area[0] <= self.augment.area[1]:
            raise ValueError("augment.area must be two shares above 0, smaller one first")
        return self
