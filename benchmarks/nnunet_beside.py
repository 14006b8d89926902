"""A plain run of nnU-Net v2 of a given length on one fold, to stand beside a run of this package on the same cases.

    python benchmarks/nnunet_beside.py [--root Dataset004_Hippocampus] [--fold 0] [--steps 200] [--planned] [--adam]

nnU-Net's own fingerprint, plan, preprocessing, trainer and predictor do the work, with their defaults: its loss with
deep supervision, SGD from 0.01, its augmentation, mirrored predictions. Only the length is given, and the size: patch
and batch of the recipe `data-sets/mr`, and a network with as many features. ``--planned`` takes the network that is
planned, ``--spacing`` another voxel size than the planned one, and ``--adam`` nnU-Net's own trainer with AdamW from
0.001, since its SGD needs far more steps than a recipe of minutes has. Training and test cases are those of nnU-Net's
fold, which Perdure takes too. Without ``--root`` some volumes are made up. Prints Dice and HD95 of the test cases.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from perdure.data.volumes.extra import need, quiet
from perdure.metrics.surfaces import surface_figures
from volume_preprocessing import write_volumes

CONFIGURATION = "3d_fullres"


@contextlib.contextmanager
def folders(place: Path) -> Iterator[None]:
    """nnU-Net's folders, and one process for its work; only while this lasts."""
    wanted = {f"nnUNet_{kind}": str(place / kind) for kind in ("raw", "preprocessed", "results")}
    wanted |= {"nnUNet_n_proc_DA": "1", "nnUNet_compile": "f"}
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def plans(number: int, place: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """nnU-Net's plan, with patch, batch and network of the size that is asked for; written where its trainer looks."""
    api = need("nnunetv2.experiment_planning.plan_and_preprocess_api")
    api.extract_fingerprint_dataset(number, num_processes=1, verbose=False, show_progress_bar=False)
    _, name = api.plan_experiment_dataset(number)
    file = next(place.glob("preprocessed/*/")) / f"{name}.json"
    content: dict[str, Any] = json.loads(file.read_text())
    found = content["configurations"][CONFIGURATION]
    found |= {"patch_size": [asked.patch] * 3, "batch_size": asked.batch}
    if asked.spacing:
        found["spacing"] = [asked.spacing] * 3
    network = found["architecture"]["arch_kwargs"]
    if not asked.planned:
        stages = len(asked.features)
        network |= {
            "n_stages": stages,
            "features_per_stage": asked.features,
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
        }
    file.write_text(json.dumps(content))
    api.preprocess_dataset(number, name, (CONFIGURATION,), [1], show_progress_bar=False)
    return content


def train(content: dict[str, Any], declared: dict[str, Any], asked: argparse.Namespace) -> Any:
    """A trainer of nnU-Net after so many of its own steps; the learning rate falls with every step."""
    place = "nnunetv2.training.nnUNetTrainer."
    adam = need(place + "variants.optimizer.nnUNetTrainerAdam").nnUNetTrainerAdam1en3
    trainer_class = adam if asked.adam else need(place + "nnUNetTrainer").nnUNetTrainer

    class Short(trainer_class):  # type: ignore[misc, valid-type]
        """nnU-Net's trainer without its epochs, which are 250 steps long and end with files and pictures."""

        def run_training(self) -> None:
            self.on_train_start()
            self.network.train()
            for step in range(self.num_epochs):
                self.lr_scheduler.step(step)
                self.train_step(next(self.dataloader_train))

        def _save_debug_information(self) -> None:
            """It would ask the machine for its name."""

    trainer = Short({**content, "continue_training": False}, CONFIGURATION, asked.fold, declared, torch.device("cpu"))
    trainer.num_epochs = asked.steps
    os.environ.update(nnUNet_n_proc_DA="0")  # patches are augmented in this process; the planner takes no 0
    trainer.run_training()
    return trainer


def measure(trainer: Any, root: Path, declared: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Dice and HD95 of every class and test case."""
    inference = need("nnunetv2.inference.predict_from_raw_data")
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor = inference.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [trainer.network.state_dict()],
        declared,
        "nnUNetTrainer",
        trainer.inference_allowed_mirroring_axes,
    )
    reader = trainer.plans_manager.image_reader_writer_class()
    names = {int(value): name for name, value in declared["labels"].items() if value}
    found: dict[str, dict[str, list[float]]] = {name: {"dice": [], "hd95": []} for name in names.values()}
    for case in trainer.do_split()[1]:
        files = sorted(str(file) for file in (root / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9].*"))
        image, properties = reader.read_images(files)
        truth = reader.read_seg(str(root / "labelsTr" / f"{case}{declared['file_ending']}"))[0][0].astype(np.int64)
        guess = np.asarray(predictor.predict_single_npy_array(image, properties)).astype(np.int64)
        surfaces = surface_figures(
            torch.from_numpy(truth), torch.from_numpy(guess), len(names) + 1, properties["spacing"], 2.0
        )
        for value, name in names.items():
            own, said = truth == value, guess == value
            found[name]["dice"].append(100 * 2 * float((own & said).sum()) / float(own.sum() + said.sum()))
            found[name]["hd95"].append(float(surfaces[value, 0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a raw folder of nnU-Net, DatasetNNN_NAME")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--features", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--planned", action="store_true", help="the network that nnU-Net plans for its own patch")
    parser.add_argument("--spacing", type=float, help="edge of a voxel in mm, in place of the planned one")
    parser.add_argument("--adam", action="store_true", help="nnU-Net's trainer with AdamW from 0.001 in place of SGD")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    np.random.seed(asked.seed)  # nnU-Net draws patches from numpy's own generator
    with tempfile.TemporaryDirectory() as folder, folders(Path(folder)):
        place = Path(folder)
        for part in ("raw", "preprocessed", "results"):
            (place / part).mkdir()
        root = place / "raw" / ("Dataset001_Made" if asked.root is None else asked.root.resolve().name)
        if asked.root is None:
            write_volumes(root, count=6)  # nnU-Net makes five folds
        else:
            shutil.copytree(asked.root, root)
        declared = json.loads((root / "dataset.json").read_text())
        with quiet():
            content = plans(int(root.name[7:10]), place, asked)
            begun = time.process_time()
            trainer = train(content, declared, asked)
            took = time.process_time() - begun
            found = measure(trainer, root, declared)
        weights = sum(parameter.numel() for parameter in trainer.network.parameters())
    length = f"{asked.steps} steps in {took:.0f} s of one processor"
    print(f"{root.name}, fold {asked.fold}: {length}, {weights:,} weights")
    for name, values in found.items():
        dice, hd95 = np.array(values["dice"]), np.array(values["hd95"])
        cases = " ".join(f"{value:.1f}" for value in dice)
        print(
            f"{name:20} Dice {dice.mean():5.1f} ± {dice.std(ddof=1):4.1f}  HD95 {np.nanmean(hd95):5.1f} mm  ({cases})"
        )
    if asked.json:
        asked.json.write_text(json.dumps({"steps": asked.steps, "weights": weights, "figures": found}))


if __name__ == "__main__":
    main()
