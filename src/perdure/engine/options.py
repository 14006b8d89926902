"""How a run uses the machine. Nothing here changes what is learned, except precision."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from perdure.files import home

Precision = Literal["fp32", "bf16", "fp16"]


class EngineOptions(BaseModel):
    """Settings of the engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU if there is one")
    precision: Precision = Field("fp32", description="fp16 needs a GPU")
    workers: int = Field(0, ge=0, le=256, description="processes that read data; 0 reads in the main process")
    threads: int | None = Field(
        None, ge=1, le=512, description="CPU threads; results are bitwise equal at equal counts only"
    )
    save_seconds: float = Field(
        120.0, ge=0, description="seconds between saves inside a phase; 0 saves after every step"
    )
    log_every: int = Field(20, ge=1, description="steps between log lines")
    validate_every: int = Field(
        0, ge=0, description="epochs between validations while training; 0 never (information only)"
    )
    compile: bool = Field(False, description="torch.compile the parts of the trained network")
    channels_last: Literal["auto", "on", "off"] = Field("auto", description="auto: 2D on a GPU or with bf16")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] | None = Field(
        None, description="tracking services; by default TensorBoard where it is installed; [] for none"
    )

    working: Path | None = Field(
        None,
        description="folder for the working files of volumes, which are deleted when a task is sealed; by default "
        "inside the run folder",
    )

    @field_validator("working")
    @classmethod
    def _home(cls, working: Path | None) -> Path | None:
        return None if working is None else home(working)

    @field_validator("channels_last", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        """YAML reads a bare on or off as true or false."""
        return "on" if value is True else "off" if value is False else value
