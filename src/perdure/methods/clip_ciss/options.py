"""Settings of CLIP-CISS."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from perdure.methods.options import Options


class ClipCissOptions(Options):
    """Settings of CLIP-CISS. The defaults are those of the published runs, with the threshold of pseudo masks fixed."""

    lambda_presence: float = Field(5.0, ge=0, description="weight of telling which classes an image shows (CACP)")
    lambda_focal: float = Field(50.0, ge=0, description="weight of the focal loss of each stage's masks")
    lambda_dice: float = Field(1.0, ge=0, description="weight of the Dice loss of each stage's masks")
    gpd: float = Field(
        1.0,
        ge=0,
        description="weight of holding how image regions lie relative to class texts (GPD); 0 for none. In the first "
        "task towards the pretrained encoder, and not at all where the encoder starts from random weights",
    )
    qd: float = Field(0.15, ge=0, description="weight of holding decoded queries of old classes (QD); 0 for none")
    presence: bool = Field(
        True, description="ask whether a class is in the image (CACP); false: masks alone decide, for comparison"
    )
    gpd_chunk: int = Field(
        2, ge=1, description="images whose regions are averaged together in GPD, whatever the batch size"
    )
    gpd_temperature: float = Field(
        1.0, gt=0, description="GPD: cosines of whole images are divided by it; 1 is published, CLIP's own is 0.01"
    )
    pseudo: Literal["reference", "comformer"] = Field(
        "comformer",
        description="which masks of old classes GPD believes the old model: those of classes that own most of what "
        "their mask marks at 0.5 (comformer), or, as published, at 0: at most one class per image, background included",
    )
    background: Literal["threshold", "none"] = Field(
        "threshold",
        description="what becomes of a pixel that no class is sure of: background (threshold), or, as published, the "
        "likeliest class all the same (none): figures that count label 0 then show it as wrong",
    )
    background_threshold: float = Field(
        0.5,
        ge=0,
        le=1,
        description="background=threshold: a class needs a higher score, which is P(present) times the mask's sigmoid",
    )
    text: str = Field(
        "auto",
        description="what class names are read by: a file or folder of CLIP weights; hash, a stand-in that knows "
        "letters and no meaning; auto is the file that network.weights names, or hash where that is no CLIP",
    )
    prompts: tuple[str, ...] = Field(
        ("a photo of a {}",), min_length=1, description="what a name is put into; of several the mean is taken"
    )
    vocabulary: Path | None = Field(
        None, description="files of CLIP's tokenizer; by default looked for beside the weights"
    )
    names: str | None = Field(
        None,
        description="names that are read in the place of the data set's: voc, ade20k, or a text file with one name per "
        "line, in the order of class ids",
    )

    @property
    def pseudo_threshold(self) -> float:
        """Least sigmoid of a pixel that counts in a pseudo mask."""
        return {"reference": 0.0, "comformer": 0.5}[self.pseudo]
