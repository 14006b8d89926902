"""Angles between two classes in the features of finished runs: can a network tell apart what it was never taught?

python scripts/feature_angles.py RUN [RUN ...] --classes AbdomenCT ChestCT [--after 0] [--split test] [--root DIR]

Looks at the test images, or with --split val at validation images, with the model as it was after a task, by default
the first. Prints, for each run, the angle between the mean directions of the classes, the mean angle of images to that
of their own class, and the share of the images of either class that lie nearer to their own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from perdure.config.build import build_method
from perdure.data.catalog import open_source
from perdure.data.preparation import Preparation
from perdure.data.source import Source, Split
from perdure.networks.classifier import Classifier
from perdure.run_folder import RunFolder
from perdure.sealing import restore_sealed
from perdure.streams.description import restore


def network_after(folder: Path, task: int) -> tuple[Classifier, Preparation]:
    """The network of a classification run after a task, by its index, and how images are shown to it."""
    run = RunFolder.existing(folder)
    recipe = run.recipe()
    tasks = restore(run.stream()).tasks
    method = build_method(recipe, tasks[0].preparation, pretrained=False)
    restore_sealed(method, tasks, run, run.sealed()[: task + 1], recipe.seed)
    network = method.eval().get_submodule("network")
    assert isinstance(network, Classifier)
    return network, tasks[task].preparation


def directions(
    network: Classifier, source: Source, wanted: Sequence[int], shown: Preparation, split: Split = "test"
) -> list[Tensor]:
    """Features of length 1 ``(n, d)`` of the images of each wanted class, shown as the run shows them."""
    images: dict[int, list[Tensor]] = {class_id: [] for class_id in wanted}
    for name in source.names(split):
        label = source.mask(split, name)
        if int(label) in images:
            images[int(label)].append(shown.show(source.read(split, name)).image)
    with torch.no_grad():
        return [torch.nn.functional.normalize(network.features(torch.stack(images[c]))) for c in wanted]


def angles(first: Tensor, second: Tensor) -> list[float]:
    """Degrees between means, within each class, and the shares that lie nearer to their own mean in percent."""
    means = torch.nn.functional.normalize(torch.stack([first.mean(0), second.mean(0)]))
    cosines = [rows @ means.T for rows in (first, second)]
    within = [_degrees(c[:, k]).mean().item() for k, c in enumerate(cosines)]
    nearer = [100 * (c.argmax(1) == k).float().mean().item() for k, c in enumerate(cosines)]
    return [_degrees(means[0] @ means[1]).item(), *within, *nearer]


def _degrees(cosines: Tensor) -> Tensor:
    return torch.rad2deg(torch.acos(cosines.clamp(-1, 1)))


def main() -> None:
    """Parse the arguments, print a row a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--classes", nargs=2, required=True)
    parser.add_argument("--after", type=int, default=0, help="index of the task")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="whose images")
    parser.add_argument("--root", type=Path, help="folder of the data (data.root)")
    asked = parser.parse_args()
    a, b = asked.classes
    print(f"| run | degrees between {a} and {b} | within {a} | within {b} | nearer to own: {a}, % | {b}, % |")
    print("|---|---|---|---|---|---|")
    for folder in asked.runs:
        recipe = RunFolder.existing(folder).recipe()
        source = open_source(recipe.sets[0].name, asked.root, recipe.sets[0].settings)
        wanted = [source.space.id_of(name) for name in asked.classes]
        network, shown = network_after(folder, asked.after)
        found = angles(*directions(network, source, wanted, shown, asked.split))
        print(f"| {folder.name} | " + " | ".join(f"{value:.1f}" for value in found) + " |")


if __name__ == "__main__":
    main()
