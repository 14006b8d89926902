"""Planted leaks: each is found, in a folder whose list of files is as it was, and in one whose list was renewed."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from perdure.audit.audit import audit
from perdure.kept.manifest import KINDS, MANIFEST, list_files

TASK = "tasks/01-09-10"
STORE = '''\
"""Fine-tuning that keeps two files per task."""

import torch

from perdure.engine.phases import Generate
from perdure.kept.items import Kept
from perdure.methods.finetune import Finetune


class Pairs(Finetune):
    def phases(self, task):
        def make(index, progress):
            return {"x": torch.rand(2)}

        return [*super().phases(task), Generate("pairs", self, 2, make, keep="pairs")]

    def kept(self):
        return [Kept("pairs", "synthetic", (), "noise", files="pairs")]
'''


def photo(side: int = 24) -> bytes:
    """A PNG that stands for a patient's image."""
    content = io.BytesIO()
    noise = np.random.Generator(np.random.PCG64(5)).integers(0, 255, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


PHOTO = photo()
TEXT = base64.b64encode(PHOTO).decode()
PIXELS = list(range(300))


def with_chunk(png: bytes, text: bytes) -> bytes:
    """The same picture with a text chunk before its end."""
    body = b"tEXt" + b"Comment\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return png[:-12] + chunk + png[-12:]


Spoil = Callable[[Path], None]
CHANNELS = {
    "kind": "slices2d", "dims": 2, "channels": 1, "patch": [32, 32], "window": None,
    "size": 32, "mean": [0.5], "std": [0.25], "modality": ["Jane Doe (1950)"],
}  # fmt: skip
"""A preparation of slices whose channel has the name of a patient."""


def append(place: str, content: bytes | str) -> Spoil:
    def spoil(run: Path) -> None:
        with (run / place).open("ab") as stream:
            stream.write(content if isinstance(content, bytes) else content.encode())

    return spoil


def write(place: str, content: bytes | str) -> Spoil:
    def spoil(run: Path) -> None:
        (run / place).parent.mkdir(parents=True, exist_ok=True)
        (run / place).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def replace(place: str, old: str, new: str) -> Spoil:
    def spoil(run: Path) -> None:
        text = (run / place).read_text()
        assert old in text
        (run / place).write_text(text.replace(old, new, 1))

    return spoil


def change(place: str, edit: Callable[[dict], object]) -> Spoil:
    """Edit a JSON file, and write it as the program does."""

    def spoil(run: Path) -> None:
        value = json.loads((run / place).read_text())
        edit(value)
        (run / place).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    return spoil


def picture(edit: Callable[[bytes], bytes]) -> Spoil:
    def spoil(run: Path) -> None:
        path = next(iter(sorted((run / TASK / "samples").glob("*.image.png"))))
        path.write_bytes(edit(path.read_bytes()))

    return spoil


def embedded(edit: Callable[[bytes], bytes]) -> Spoil:
    """Change a picture of the report."""

    def spoil(run: Path) -> None:
        page = (run / "report.html").read_text()
        start = page.index("base64,") + 7
        end = page.index('"', start)
        packed = base64.b64encode(edit(base64.b64decode(page[start:end]))).decode()
        (run / "report.html").write_text(page[:start] + packed + page[end:])

    return spoil


def tensors(edit: Callable[[dict], object], metadata: dict[str, str] | None = None) -> Spoil:
    def spoil(run: Path) -> None:
        path = run / TASK / "weights.safetensors"
        found = {name: tensor.clone() for name, tensor in load_file(path).items()}
        edit(found)
        save_file(found, path, metadata or {})

    return spoil


def listed_twice(key: str) -> Spoil:
    """An entry of files.json twice, the first time with a text in the place of a hash or kind."""

    def spoil(run: Path) -> None:
        lines = (run / MANIFEST).read_text().splitlines()
        entry = json.loads(lines[1].rstrip(","))
        lines.insert(1, "  " + json.dumps({**entry, key: TEXT}) + ",")
        (run / MANIFEST).write_text("\n".join(lines) + "\n")

    return spoil


def other_order(run: Path) -> None:
    lines = (run / MANIFEST).read_text().splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (run / MANIFEST).write_text("\n".join(lines) + "\n")


def sample(part: str, edit: Callable[[Image.Image], Image.Image]) -> Spoil:
    """Replace a picture of a sample, and let its ledger say so."""

    def spoil(run: Path) -> None:
        path = sorted((run / TASK / "samples").glob(f"*.{part}.png"))[0]
        edit(Image.open(path)).save(path)
        renew_files(run)

    return spoil


def veiled(picture: Image.Image) -> Image.Image:
    """The same picture; in its alpha channel is another one."""
    side = np.random.Generator(np.random.PCG64(5)).integers(0, 255, picture.size[::-1], np.uint8)
    picture = picture.convert("RGB")
    picture.putalpha(Image.fromarray(side))
    return picture


def renew_files(run: Path) -> None:
    """Let ledgers say what is in pictures by now."""
    from perdure.files import sha256

    for ledger in run.glob("tasks/*/ledger.json"):
        value = json.loads(ledger.read_text())
        for entry in value["items"]:
            for file in entry["files"]:
                file.update(bytes=(run / file["file"]).stat().st_size, sha256=sha256(run / file["file"]))
            if entry["kind"] == "preview":
                entry["bytes"] = sum(file["bytes"] for file in entry["files"])
        value["total_bytes"]["preview"] = sum(e["bytes"] for e in value["items"] if e["kind"] == "preview")
        ledger.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def recipe(edit: Callable[[dict], object]) -> Spoil:
    """Edit the recipe, and write it as the program does."""

    def spoil(run: Path) -> None:
        value = yaml.safe_load((run / "recipe.yaml").read_text())
        edit(value)
        (run / "recipe.yaml").write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))

    return spoil


def ledger(edit: Callable[[dict], object]) -> Spoil:
    return change(f"{TASK}/ledger.json", edit)


def log(**values: object) -> Spoil:
    return append("log.jsonl", json.dumps({"seconds": 1.0, **values}) + "\n")


def second_weights(run: Path) -> None:
    """Another item of the kind weights, with images in it."""
    from perdure.files import sha256
    from perdure.kept.method_state import hash_of

    images, place = torch.rand(2, 3, 8, 8), f"{TASK}/kept/more.safetensors"
    (run / place).parent.mkdir(exist_ok=True)
    save_file({"images": images}, run / place)
    size = (run / place).stat().st_size

    def add(value: dict) -> None:
        tensor = {"name": "images", "shape": [2, 3, 8, 8], "dtype": "float32", "sha256": hash_of(images), "file": place}
        file = {"file": place, "bytes": size, "sha256": sha256(run / place)}
        item = {**value["items"][0], "name": "more", "bytes": images.nbytes, "files": [file], "tensors": [tensor]}
        value["items"].insert(1, item)
        value["total_bytes"]["weights"] += images.nbytes

    ledger(add)(run)
    list_it(place, "weights")(run)


def huge(png: bytes) -> bytes:
    """The same picture, whose header says that it has 2 ** 32 - 1 pixels on each side."""
    head = b"IHDR" + struct.pack(">II", 2**32 - 1, 2**32 - 1) + png[24:29]
    return png[:12] + head + struct.pack(">I", zlib.crc32(head)) + png[33:]


def two_headers(png: bytes) -> bytes:
    body = b"IHDR" + PHOTO
    return png[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + png[33:]


def then(*steps: Spoil) -> Spoil:
    def spoil(run: Path) -> None:
        for step in steps:
            step(run)

    return spoil


def renew_hashes(run: Path, read: bool = True) -> None:
    """Let the ledger say what is in the weights' file by now: tensors with their hashes, bytes and the file's hash."""
    from perdure.files import sha256
    from perdure.kept.method_state import hash_of

    path, ledger = run / TASK / "weights.safetensors", run / TASK / "ledger.json"
    value, place = json.loads(ledger.read_text()), f"{TASK}/weights.safetensors"
    entry = value["items"][0]
    entry["tensors"] = [t for t in entry["tensors"] if t["file"] != place or not read]
    for name, tensor in load_file(path).items() if read else ():
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = list(tensor.shape)
        entry["tensors"].append(
            {"name": name, "shape": shape, "dtype": dtype, "sha256": hash_of(tensor), "file": place}
        )
        entry["tensors"] = [t for t in entry["tensors"] if t["name"] != name or t["file"] == place]
    for file in entry["files"]:
        file.update(bytes=(run / file["file"]).stat().st_size, sha256=sha256(run / file["file"]))
    sizes = {"float32": 4, "int64": 8, "uint8": 1}
    entry["bytes"] = sum(int(np.prod(t["shape"])) * sizes[t["dtype"]] for t in entry["tensors"])
    value["total_bytes"]["weights"] = entry["bytes"]
    ledger.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def renew_list(run: Path) -> None:
    """Let files.json say what is in every file that it lists by now, as somebody would who knows of it."""
    from perdure.files import sha256

    text = (run / MANIFEST).read_text()
    lines = []
    for line in text.splitlines():
        if line.startswith('  {"file"'):
            entry = json.loads(line.strip().rstrip(","))
            path = run / entry["file"]
            if path.is_file() and not path.is_symlink():
                entry.update(bytes=path.stat().st_size, sha256=sha256(path))
            line = "  " + json.dumps(entry, ensure_ascii=False) + ("," if line.endswith(",") else "")
        lines.append(line)
    (run / MANIFEST).write_text("\n".join(lines) + "\n")


def list_it(place: str, kind: str) -> Spoil:
    """Add a file to files.json."""

    def spoil(run: Path) -> None:
        from perdure.files import sha256

        entries = json.loads((run / MANIFEST).read_text())["files"]
        path = run / place
        entries.append({"file": place, "kind": kind, "bytes": path.stat().st_size, "sha256": sha256(path)})
        lines = ",\n".join("  " + json.dumps(e) for e in sorted(entries, key=lambda e: e["file"]))
        (run / MANIFEST).write_text(f'{{"version": 1, "files": [\n{lines}\n]}}\n')

    return spoil


class Case(NamedTuple):
    """A leak: how it is planted, the file that is named, and what is said of it where the list was renewed."""

    name: str
    spoil: Spoil
    place: str
    told: str


EVENTS = "tracking/tiny/events.out.tfevents.000000.perdure"
CHANGED = "something was added or changed"
UNKNOWN = "no ledger knows this file"
CASES = [
    Case("page-tag", replace("report.html", "</body>", f'<img src="data:image/png;base64,{TEXT}"></body>'),
         "report.html", CHANGED),
    Case("page-comment", replace("report.html", "</body>", f"<!-- {TEXT} --></body>"), "report.html", CHANGED),
    Case("page-trailing-bytes", append("report.html", PHOTO), "report.html", "is no text"),
    Case("page-trailing-text", append("report.html", TEXT), "report.html", CHANGED),
    Case("page-picture-with-a-text-chunk", embedded(lambda png: with_chunk(png, PHOTO)), "report.html",
         "a chunk 'tEXt' besides the picture"),
    Case("page-picture-with-two-headers", embedded(two_headers), "report.html", "is a damaged PNG picture"),
    Case("card-picture", append("MODEL_CARD.md", f"\n![](data:image/png;base64,{TEXT})\n"), "MODEL_CARD.md", CHANGED),
    Case("card-comment", append("MODEL_CARD.md", f"\n<!-- {TEXT} -->\n"), "MODEL_CARD.md", CHANGED),
    Case("card-name", append("MODEL_CARD.md", "\nJane Doe, born 1950\n"), "MODEL_CARD.md", CHANGED),
    Case("log-picture", append("log.jsonl", json.dumps({"seconds": 1.0, "image": TEXT}) + "\n"), "log.jsonl",
         "holds 'image', which is not a number"),
    Case("log-name", append("log.jsonl", json.dumps({"seconds": 1.0, "event": "Jane Doe"}) + "\n"), "log.jsonl",
         "holds the unknown event 'Jane Doe'"),
    Case("log-pixels", append("log.jsonl", json.dumps({"seconds": 1.0, "loss": PIXELS}) + "\n"), "log.jsonl",
         "holds 'loss', which is not a number"),
    Case("log-trailing-bytes", append("log.jsonl", PHOTO), "log.jsonl", "cannot be read"),
    Case("log-end-of-a-line", append("log.jsonl", "Jane Doe, born 1950"), "log.jsonl", "holds more than whole lines"),
    Case("recipe-comment", append("recipe.yaml", f"# {TEXT}\n"), "recipe.yaml", "it holds comments or other text"),
    Case("recipe-text", replace("recipe.yaml", "about: ", f"about: {TEXT}"), "recipe.yaml", "is not as it was written"),
    Case("recipe-key", append("recipe.yaml", f"photo: {TEXT}\n"), "recipe.yaml", "recipe.yaml"),
    Case("csv", append("results.csv", ",".join(map(str, PIXELS)) + "\n"), "results.csv", "does not agree with"),
    Case("json-results", change("results.json", lambda v: v.update(a=PIXELS)), "results.json", "does not agree with"),
    Case("json-counts", replace(f"{TASK}/counts.json", '{"version"', f'{{"pixels": {PIXELS}, "version"'),
         f"{TASK}/counts.json", "holds more than counts"),
    Case("json-environment", change("environment.json", lambda v: v.update(photo=TEXT)), "environment.json",
         "holds the unknown key 'photo'"),
    Case("json-environment-value", change("environment.json", lambda v: v.update(system=TEXT)), "environment.json",
         "'system' is not a version"),
    Case("json-stream", change("stream.json", lambda v: v.update(pixels=PIXELS)), "stream.json",
         "holds 'pixels', which is no part of a stream"),
    Case("json-preparation", change("stream.json", lambda v: v["tasks"][0]["preparation"].update(x=TEXT)),
         "stream.json", "stream.json"),
    Case("lock", write(".lock", PHOTO), ".lock", "is not empty"),
    Case("done", write(f"{TASK}/done", PHOTO), f"{TASK}/done", "holds more than the number of the task"),
    Case("tracking-picture", write(EVENTS, PHOTO), EVENTS, "event file"),
    Case("tracking-trailing-bytes", append(EVENTS, PHOTO), EVENTS, "event file"),
    Case("tracking-other", write("tracking/tiny/photo.png", PHOTO), "tracking/tiny/photo.png", UNKNOWN),
    Case("tracking-more", write("tracking/tiny/events.out.tfevents.000001.perdure", PHOTO),
         "tracking/tiny/events.out.tfevents.000001.perdure", UNKNOWN),
    Case("resume", write("resume/state.safetensors", PHOTO), "resume/state.safetensors", UNKNOWN),
    Case("link", lambda run: (run / TASK / "samples/x.image.png").symlink_to("00000.image.png"),
         f"{TASK}/samples/x.image.png", "is a link"),
    Case("link-to-a-folder", lambda run: (run / "kept").symlink_to(run.parent), "kept", "is a link"),
    Case("pipe", lambda run: os.mkfifo(run / "pipe"), "pipe", "is no file"),
    Case("other-suffix", write("notes.bin", PHOTO), "notes.bin", UNKNOWN),
    Case("temporary", write(".part-abc.png", PHOTO), ".part-abc.png", UNKNOWN),
    Case("hidden", write(f"{TASK}/.photo", PHOTO), f"{TASK}/.photo", UNKNOWN),
    Case("more-samples", write(f"{TASK}/samples/00099.image.png", PHOTO), f"{TASK}/samples/00099.image.png", UNKNOWN),
    Case("listed-nowhere-else", then(write("photo.png", PHOTO), list_it("photo.png", "preview")), "photo.png", UNKNOWN),
    Case("preview-replaced", picture(lambda png: PHOTO), "image.png", "is not what the ledger says"),
    Case("preview-trailing-bytes", picture(lambda png: png + PHOTO), "image.png", "is not what the ledger says"),
    Case("preview-text-chunk", picture(lambda png: with_chunk(png, PHOTO)), "image.png", "is not what the ledger says"),
    Case("tensor", tensors(lambda t: t[min(t)].zero_()), "weights.safetensors", "is not what the ledger says"),
    Case("tensor-metadata", tensors(lambda t: None, {"photo": TEXT}), "weights.safetensors",
         "is not what the ledger says"),
    Case("tensor-metadata-with-renewed-ledger", then(tensors(lambda t: None, {"photo": TEXT}), renew_hashes),
         "weights.safetensors", "holds metadata besides its tensors"),
    Case("tensor-trailing-bytes-with-renewed-ledger",
         then(append(f"{TASK}/weights.safetensors", PHOTO), lambda run: renew_hashes(run, False)),
         "weights.safetensors", "holds bytes that belong to no tensor"),
    Case("buffer-with-renewed-ledger", then(tensors(lambda t: t.update(images=torch.rand(2, 3, 8, 8))), renew_hashes),
         "weights.safetensors", "'images' is called a weight, but is none of the network"),
    Case("images-in-a-weight",
         then(tensors(lambda t: t.update({min(t): torch.rand(2, 3, 8, 8)})),
              renew_hashes), "weights.safetensors", "is called a weight, but is none of the network"),
    Case("kept-file", write("kept/00-00-x/000000.safetensors", PHOTO), "kept/00-00-x/000000.safetensors", UNKNOWN),
    Case("patients-in-ledger", change(f"{TASK}/ledger.json", lambda v: v.update(patients=True)), "ledger.json",
         "says that the images come from patients"),
    Case("ledger-key", change(f"{TASK}/ledger.json", lambda v: v.update(photo=TEXT)), "ledger.json",
         "holds more than a ledger does"),
    Case("totals", change(f"{TASK}/ledger.json", lambda v: v["total_bytes"].update(weights=7)), "ledger.json",
         "its totals are not the sums of its items"),
    Case("bytes", change(f"{TASK}/ledger.json", lambda v: (v["items"][0].update(bytes=7), v["total_bytes"].update(
         weights=7))), "ledger.json", "'weights' counts 7 bytes, but has"),
    Case("unknown-kind", change(f"{TASK}/ledger.json", lambda v: (v["items"][0].update(kind="magic"), v.update(
         total_bytes={"magic" if k == "weights" else k: n for k, n in v["total_bytes"].items()}))), "ledger.json",
         "'weights' is of the unknown kind 'magic'"),
    Case("name-of-a-folder", lambda run: (run / "tasks/01-Jane-Doe").mkdir(), "tasks/01-Jane-Doe", "no folder of this"),
    Case("name-of-a-trackers-folder", write("tracking/Jane/x", b""), "tracking/Jane/x", UNKNOWN),
    Case("empty-folder", lambda run: (run / TASK / "samples/Jane").mkdir(), f"{TASK}/samples/Jane", "no folder of"),
    Case("list-hash-that-is-a-text", listed_twice("sha256"), MANIFEST, "cannot be used"),
    Case("list-kind-that-is-a-text", listed_twice("kind"), MANIFEST, "lists files twice, or not in order"),
    Case("list-order", other_order, MANIFEST, "lists files twice, or not in order"),
    Case("preview-alpha", sample("image", veiled), "image.png", "without transparency"),
    Case("preview-of-another-size", sample("pred", lambda p: Image.new("RGBA", (90, 70))), "pred.png",
         "is not of the size of the sample's image"),
    Case("map-of-a-photograph", sample("truth", lambda p: Image.open(io.BytesIO(PHOTO)).resize(p.size).convert("RGBA")),
         "truth.png", "colours that no class of the run has"),
    Case("preview-huge", then(picture(huge), renew_files), "image.png", "too large to be one of a run"),
    Case("recipe-option", recipe(lambda v: v["data"].update(x=[[k] for k in PIXELS])), "recipe.yaml",
         "has no option 'x'"),
    Case("recipe-numbers", recipe(lambda v: v["stream"].update(order=PIXELS)), "recipe.yaml", "orders other classes"),
    Case("recipe-digits", recipe(lambda v: v.update(seed=int("7" * 400))), "recipe.yaml", "seed"),
    Case("recipe-mean", recipe(lambda v: v["augment"].update(mean=[0.5] * 99, std=[0.5] * 99)), "recipe.yaml", "mean"),
    Case("recipe-place", recipe(lambda v: v["stream"].update(partition_file=TEXT[:900].replace("/", "_"))),
         "recipe.yaml", "holds a text of 900 characters"),
    Case("second-weights", second_weights, "more.safetensors", "is called a weight, but is none of the network"),
    Case("weights-not-finite", then(tensors(lambda t: t[min(t)].fill_(float("nan"))), renew_hashes),
         "weights.safetensors", "is not finite"),
    Case("ledger-made-from", ledger(lambda v: v["items"][0].update(made_from=TEXT)), "ledger.json", "is too long"),
    Case("ledger-made-from-name", ledger(lambda v: v["items"][0].update(made_from="training data of Jane Doe")),
         "ledger.json", "'jane', which is no word of the method"),
    Case("ledger-made-from-of-a-picture", ledger(lambda v: v["items"][-1].update(made_from=TEXT[:99])), "ledger.json",
         "does not say so as the run does"),
    Case("ledger-task", ledger(lambda v: v.update(task=TEXT)), "ledger.json", "names a task that is none of the"),
    Case("ledger-shows", ledger(lambda v: v["items"][0].update(shows=TEXT)), "ledger.json", "says otherwise"),
    Case("ledger-digits", ledger(lambda v: v["items"][0].update(from_images=int("7" * 400))), "ledger.json",
         "is not a ledger"),
    Case("ledger-empty-items", ledger(lambda v: v["items"].extend([{**v["items"][0], "bytes": 0, "name": TEXT[k:k + 99],
         "files": [], "tensors": []} for k in range(200)])), "ledger.json", "more than 100 items"),
    Case("log-digits", log(loss=int("7" * 320)), "log.jsonl", "holds 'loss', which is not a number"),
    Case("log-key", log(**{base64.b32encode(PHOTO[:40]).decode().rstrip("="): 0}), "log.jsonl",
         "which is not a number"),
    Case("log-pixels-one-by-one", log(**{f"p{k}": k for k in PIXELS}), "log.jsonl", "more figures"),
    Case("log-phases", lambda run: [log(phase=PHOTO.hex()[k:k + 40])(run) for k in range(400)], "log.jsonl",
         "names the phase"),
    Case("log-phase-name", log(phase="Jane Doe, born 1950"), "log.jsonl", "names the phase 'Jane Doe, born 1950'"),
    Case("log-phase-of-nobody", log(phase="jane doe"), "log.jsonl", "names the phase 'jane doe', which no method"),
    Case("log-phase-number", log(phase=7), "log.jsonl", "names the phase '7'"),
    Case("stream-channel", change("stream.json", lambda v: v["tasks"][0].update(preparation=CHANNELS)),
         "stream.json", "names the channel 'Jane Doe (1950)', which is no short name"),
    Case("stream-digest", change("stream.json", lambda v: v["tasks"][0].update(digest=TEXT[:900])), "stream.json",
         "holds a fingerprint of images that is none"),
    Case("stream-images", change("stream.json", lambda v: v["tasks"][0].update(images=int("7" * 400))), "stream.json",
         "holds a number of images that no task has"),
    Case("stream-color", change("stream.json", lambda v: v["classes"][0].update(color=[1, 2, 9**9])), "stream.json",
         "holds a colour that is none"),
    Case("environment-digits", change("environment.json", lambda v: v.update(threads=int("7" * 99))),
         "environment.json", "'threads' is not a version"),
    Case("empty-store", lambda run: (run / "kept").mkdir(), "kept", "no folder of this name"),
    Case("empty-trackers-folder", lambda run: (run / "tracking/Jane").mkdir(parents=True), "tracking/Jane",
         "no folder of this name"),
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(cli, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of fine-tuning: 2 tasks, 100 kB."""
    folder = tmp_path_factory.mktemp("leaks")
    (folder / "tiny.yaml").write_text(tiny)
    words = "method=finetune", "stream.base=8", "network.width=8", "report.samples=1", "data.train=12", "seed=1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(folder / "cache"))
        done = cli("run", folder / "tiny.yaml", *words, "--out", folder / "run", "--quiet", "--allow-code")
    assert done.code == 0, done.err
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_clean_run_passes_and_every_byte_is_counted(run: Path, cli) -> None:
    done = cli("audit", run)
    assert (done.code, done.err) == (0, ""), done.out
    assert "audit passed" in done.out and "It does not mean that" in done.out
    found = json.loads(cli("audit", run, "--json").out)
    sizes = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
    assert sum(size for _, size in found["files"].values()) == sum(sizes)
    assert sum(number for number, _ in found["files"].values()) == len(sizes)


@pytest.mark.parametrize("renewed", [False, True], ids=["list-as-it-was", "list-renewed"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_leak_is_found(case: Case, renewed: bool, run: Path, cli) -> None:
    case.spoil(run)
    if renewed:
        renew_list(run)
    done = cli("audit", run)
    assert (done.code, done.err) == (1, ""), done.out
    lines = [line for line in done.out.splitlines() if line.startswith("problem ")]
    mine = [line for line in lines if case.place in line]
    assert mine, lines
    if renewed:
        assert any(case.told in line for line in mine), mine


SHOWN = {
    "recipe.yaml": replace("recipe.yaml", "about: the smallest run", "about: Jane Doe 1950, the smallest run"),
    "environment.json": change("environment.json", lambda v: v.update(gpu="Jane Doe 1950")),
    "stream.json": change("stream.json", lambda v: v["tasks"][0].update(images=4000)),
}


@pytest.mark.parametrize("place", SHOWN)
def test_a_page_that_differs_may_be_right(place: str, run: Path) -> None:
    """Only the page tells of such a change: to write it again, as the audit once advised, makes the change pass."""
    SHOWN[place](run)
    renew_list(run)
    problems = audit(run).problems
    assert problems and {problem.partition(":")[0] for problem in problems} <= {"report.html", "MODEL_CARD.md"}
    assert place in problems[0] and "compare them with a copy" in problems[0]
    assert not any("report` writes it again" in problem for problem in problems)


@pytest.mark.parametrize("place", [place for place in KINDS if place not in ("recipe.yaml", "stream.json")])
def test_a_file_of_every_finished_run_is_missed(place: str, run: Path) -> None:
    (run / place).unlink()
    assert f"{place}: {MANIFEST} lists it, but it is missing" in audit(run).problems
    list_files(run, (), dropped=[place])
    assert f"{place}: is missing, and every finished run has it: restore it from a copy" in audit(run).problems


def attributes(path: Path) -> bool:
    """Give a file an extended attribute, where the file system has them."""
    try:
        os.setxattr(path, "user.photo", PHOTO)
    except (AttributeError, OSError):
        return False
    return True


def test_an_extended_attribute_is_found(run: Path) -> None:
    if not attributes(run / TASK / "counts.json"):
        pytest.skip("this file system has no extended attributes")
    assert audit(run).problems == [
        f"{TASK}/counts.json: has the extended attribute 'user.photo': remove it with `setfattr -x`"
    ]


def test_one_bad_file_does_not_hide_the_others(run: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a check of one file raises: it is told of the file, and the rest is looked into."""

    def fails(path: Path) -> None:
        raise ZeroDivisionError(f"of {path.name}")

    monkeypatch.setattr("perdure.audit.ledgers._picture_problem", fails)
    append("log.jsonl", "x\n")(run)
    renew_list(run)
    problems = audit(run).problems
    assert any("image.png: cannot be checked: of 0" in p for p in problems), problems
    assert any(p.startswith("log.jsonl: ") for p in problems), problems


def test_names_of_files_do_not_command_the_terminal(run: Path, cli) -> None:
    (run / "a\x1b[32m\naudit passed").write_bytes(b"")
    done = cli("audit", run)
    assert done.code == 1
    assert "\x1b[32m" not in done.out and "a\\x1b[32m audit passed: no ledger knows this file" in done.out
    assert "\x1b" not in cli("audit", run, "--json").out


@pytest.mark.parametrize("place", [f"{TASK}/ledger.json", MANIFEST])
def test_a_newer_version_is_refused(place: str, run: Path, cli) -> None:
    text = (run / place).read_text()
    (run / place).write_text(text.replace('"version": 3', '"version": 9').replace('"version": 1,', '"version": 9,'))
    verbs = [("audit", run)]
    if place != MANIFEST:
        verbs += [("report", run), ("predict", run, "-i", sorted(run.rglob("*.image.png"))[0], "-o", run.parent / "o")]
    for words in verbs:
        done = cli(*words)
        assert done.code == 1, words
        assert "is of version 9; this Perdure reads versions up to" in done.err and "newer Perdure" in done.err


def test_patients_edited_in_the_stream_alone(run: Path) -> None:
    """The other way round, so that the tiny run need not be of patients: stream and ledgers have to agree."""
    replace("stream.json", '"patients": false', '"patients": true')(run)
    renew_list(run)
    problems = audit(run).problems
    assert any("ledger.json: says that the images come from no patients, stream.json that" in p for p in problems)
    assert sum("raw patient data (preview" in p for p in problems) == 2 * 4


@pytest.fixture(scope="module")
def stored(cli, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose method keeps files."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "leaky_pairs.py").write_text(STORE)
    (folder / "tiny.yaml").write_text(tiny)
    words = "method=leaky_pairs:Pairs", "stream.base=8", "network.width=8", "report.samples=0", "data.train=12"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(folder / "cache"))
        patch.syspath_prepend(folder)
        done = cli("run", folder / "tiny.yaml", *words, "--out", folder / "run", "--quiet", "--allow-code")
    assert done.code == 0, done.err
    return folder / "run"


PAIR = "kept/01-01-pairs/000001.safetensors"


def zeros(place: str) -> Spoil:
    return lambda run: save_file({"x": torch.zeros(2)}, run / place)


@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: None, None),
        (zeros(PAIR), "is not what the ledger says"),
        (zeros("kept/01-01-pairs/000002.safetensors"), UNKNOWN),
        (lambda run: (run / "kept/Jane").mkdir(), "no folder of this name"),
    ],
)
def test_files_that_a_method_keeps(spoil: Spoil, told: str | None, renewed: bool, stored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(stored, tmp_path / "run"))
    spoil(run)
    if renewed:
        renew_list(run)
    problems = audit(run).problems
    if told is None:
        assert problems == []
    else:
        assert len(problems) == 1 and (told in problems[0] or "hash differs" in problems[0]), problems
