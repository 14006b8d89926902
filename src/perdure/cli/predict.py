"""``perdure predict``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from perdure.errors import UsageError, nearest


def predict(run: Path, inputs: list[Path], out: Path, device: str) -> None:
    """Segment or classify images with a run's newest sealed model."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"there is no device '{device}'", nearest(device, ("auto", "cpu", "cuda")))
    from perdure.predict_files import classify_images, find_images, predict_images
    from perdure.trained import Trained

    total = len(find_images(inputs))
    model = Trained.open(run, device)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("images", total=total)
        work = predict_images if model.kind == "segmentation" else classify_images
        work(model, inputs, out, lambda done, _: bar.update(shown, completed=done))
    told, where = ("segmented", out) if model.kind == "segmentation" else ("classified", out / "predictions.csv")
    text = f"{total} image(s) {told} into {len(model.seen)} classes -> {where}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
