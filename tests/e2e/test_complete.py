"""Tab completion as a shell asks for it: the right names, and nothing heavy imported for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.e2e
ASK = """
import json, sys
sys.argv = ["perdure"]
from perdure.cli import main
try:
    main()
except SystemExit as left:
    heavy = [name for name in ("torch", "timm", "PIL", "sklearn", "matplotlib") if name in sys.modules]
    print(json.dumps([heavy, left.code]), file=sys.stderr)
"""


def complete(words: list[str], shell: str = "bash") -> list[str]:
    """What is offered for the last word of a line."""
    line = " ".join(["perdure", *words])
    asked = {
        "bash": {"COMP_WORDS": line, "COMP_CWORD": str(len(words)), "_PERDURE_COMPLETE": "complete_bash"},
        "zsh": {"_TYPER_COMPLETE_ARGS": line, "_PERDURE_COMPLETE": "complete_zsh"},
    }[shell]
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=os.environ | asked, capture_output=True, text=True, check=True
    )
    heavy, code = json.loads(done.stderr)
    assert (heavy, code) == ([], 0), done.stderr
    return done.stdout.split()


DATA_SETS = [f"data-sets/{name}" for name in ("mr", "prostate", "slices", "torso", "vessels-cells", "volumes")]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["run", "dem"], ["demo", "demo-volumes"]),
        (["run", "star/camvid"], ["star/camvid-6-1"]),
        (["check", "class"], ["class_folders"]),
        (["check", "d"], [*DATA_SETS, "demo-volumes", "demo", "digits", "decathlon"]),
        (["list", "me"], ["methods", "metrics"]),
        (["phantoms", ""], ["slices", "torso"]),
        (["check", "phantoms", "s"], ["seed=", "set=", "size=", "source="]),
        (["compare", "run", "--figure", "hio"], ["hiou[bg=in,absent=skip]"]),
        (["run", "demo", "training.ep"], ["training.epochs="]),
        (["run", "demo", "seed=2", "engine.thr"], ["engine.threads="]),
        (["check", "demo", "stream.set"], ["stream.setting="]),
        # bash makes words of its own at the sign of equality
        (["run", "demo", "method", "=", "fi"], ["finetune"]),
        (
            ["run", "demo", "method", "="],
            ["ccsi", "ccsi_seg", "cgr", "clip_ciss", "finetune", "independent", "joint", "lwf", "star"],
        ),
        (["check", "demo", "engine.precision", "=", "b"], ["bf16"]),
        (["run", "demo", "data", "=", "cam"], ["camvid"]),
        (["run", "demo", "network.name", "=", "d"], ["deeplab"]),
        (["run", "demo", "nothing.like.it"], []),
        (["compare", "run", "--figure", "io"], []),  # one value per class: it cannot be compared
        (["run", "demo", "network.weights", "="], ["imagenet", "installed", "random"]),
        (["check", "folders", "photos", "v"], ["validation=", "values="]),
        (["check", "camvid", "photos", "v"], ["validation="]),
    ],
)
def test_names(words: list[str], offered: list[str]) -> None:
    found = complete(words)
    assert sorted(found) == offered or found == offered


def test_shells_that_leave_words_whole() -> None:
    assert "method=finetune" in " ".join(complete(["run", "demo", "method=fi"], "zsh"))


def test_it_can_be_installed(cli) -> None:
    shown = cli("--help")
    assert shown.code == 0 and "--install-completion" in shown.out
