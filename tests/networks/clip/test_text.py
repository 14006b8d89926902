"""Names, tokens, text tables."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from perdure.errors import DataError, UsageError
from perdure.files import cache_dir, sha256
from perdure.networks.clip import text as text_module
from perdure.networks.clip.names import class_names, names_hash
from perdure.networks.clip.text import hash_vectors, text_table
from perdure.networks.clip.tokenizer import load_tokenizer
from perdure.networks.clip.weights import read_clip, text_model

VOCABULARY = 518  # two tokens per byte, four merges, two marks
START, END = VOCABULARY - 2, VOCABULARY - 1


@pytest.mark.parametrize(
    ("source", "count", "first", "last", "digest"),
    [
        ("voc", 20, "aeroplane", "tvmonitor", "5f14e61c67dac3bd5ca085f9fd354b5e9360638f7d83b3789c150464d7555a5b"),
        ("ade20k", 150, "wall", "flag", "5bea6041a1090b0b899c1d50c74cb0ec2ad843c0ba5602c9dd9802d78eb8c064"),
    ],
)
def test_published_names_are_unchanged(source: str, count: int, first: str, last: str, digest: str) -> None:
    names = class_names(source)
    assert (len(names), names[0], names[-1]) == (count, first, last)
    assert names_hash(names) == digest


def test_names_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("liver\nleft kidney \n", encoding="utf-8")
    assert class_names(path) == ("liver", "left kidney")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"liver\n\nspleen\n", "class 2 has an empty name"),
        (b"liver\nspleen\n Liver\n", "classes 1 and 3 are both called 'Liver'"),
        (b"\xff\xfe", "is no list of class names"),
    ],
)
def test_files_of_names_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        class_names(path)


def test_unknown_lists_of_names_are_told_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="no class names 'ade20'") as raised:
        class_names("ade20")
    assert "did you mean 'ade20k'" in raised.value.hint


def cat_dog(clip: nn.Module) -> torch.Tensor:
    """Vectors of "cat" and "dog" from the model's own text encoder; each is one merged token."""
    tokens = torch.tensor([[START, 513, END], [START, 515, END]])
    with torch.no_grad():
        return F.normalize(clip.encode_text(tokens), dim=1)


@pytest.mark.parametrize("layout", ["torchscript", "open_clip"])
def test_the_table_is_the_text_encoders_own(clip: nn.Module, published: Callable[[str], Path], layout: str) -> None:
    path = published(layout)
    table = text_table(["cat", "dog"], path, dim=32, templates=["{}"])
    torch.testing.assert_close(table.vectors, cat_dog(clip), rtol=1e-5, atol=1e-5)
    file = path if path.is_file() else path / "open_clip_model.safetensors"
    assert (table.weights.source, table.weights.sha256) == (str(path), sha256(file))
    assert table.names_sha256 == names_hash(["cat", "dog"])


def test_a_hugging_face_folder_with_its_own_vocabulary(clip: nn.Module, published: Callable[[str], Path]) -> None:
    folder = published("hugging_face")
    with pytest.raises(DataError, match="holds no vocabulary for CLIP's text encoder"):
        text_table(["cat", "dog"], folder, dim=32)
    tokenizer = load_tokenizer(published("torchscript").parent / "bpe_simple_vocab_16e6.txt.gz", VOCABULARY)
    tokenizer._tokenizer.model.save(str(folder))
    assert {file.name for file in folder.iterdir()} >= {"vocab.json", "merges.txt"}
    table = text_table(["cat", "dog"], folder, dim=32, templates=["{}"])
    torch.testing.assert_close(table.vectors, cat_dog(clip), rtol=1e-5, atol=1e-5)


def test_prompts_are_split_as_clip_does(archive: Path) -> None:
    tokenizer = load_tokenizer(archive.parent / "bpe_simple_vocab_16e6.txt.gz", VOCABULARY)
    letter = {c: ord(c) - ord("!") for c in "abcdefghijklmnopqrstuvwxyz"}
    # "a" at the end of a word is the second kind of its byte; "Cats" is ca + t + s</w>
    ids = tokenizer(["a  Cats"]).input_ids[0]
    assert ids == [START, 256 + letter["a"], 512, letter["t"], 256 + letter["s"], END]


def test_of_several_prompts_the_mean_is_taken(archive: Path) -> None:
    both = text_table(["cat"], archive, dim=32, templates=["{}", "a {}"]).vectors
    each = [text_table(["cat"], archive, dim=32, templates=[prompt]).vectors for prompt in ("{}", "a {}")]
    torch.testing.assert_close(both, F.normalize(each[0] + each[1], dim=1))
    assert not torch.allclose(each[0], each[1], atol=1e-3)


def test_rows_do_not_depend_on_the_other_names(archive: Path) -> None:
    names = ["cat", "big dog", "dog"]
    whole = text_table(names, archive, dim=32).vectors
    for row, name in enumerate(names):
        torch.testing.assert_close(whole[row], text_table([name], archive, dim=32).vectors[0], rtol=1e-4, atol=1e-5)


def test_a_table_is_made_once_per_names_prompt_and_weights(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    encode = text_module._encode
    monkeypatch.setattr(text_module, "_encode", lambda words, *rest: made.append(len(words)) or encode(words, *rest))
    first = text_table(["cat", "dog"], archive, dim=32).vectors
    assert torch.equal(text_table(["cat", "dog"], archive, dim=32).vectors, first)
    assert len(made) == 1
    assert torch.equal(text_table(["dog", "cat"], archive, dim=32).vectors.flip(0), first) or len(made) == 2
    text_table(["cat", "dog"], archive, dim=32, templates=["{}"])
    other = tmp_path / "other.safetensors"
    state = {name: tensor + 1 for name, tensor in load_openai(archive).items()}
    save_file(state, other)
    text_table(["cat", "dog"], other, dim=32, vocabulary=archive.parent / "bpe_simple_vocab_16e6.txt.gz")
    assert len(made) == 4
    (kept, *_) = (cache_dir() / "text").glob("*.safetensors")
    for file in (cache_dir() / "text").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(text_table(["cat", "dog"], archive, dim=32).vectors, first)
    assert len(made) == 5
    assert kept.exists()


def load_openai(archive: Path) -> dict[str, torch.Tensor]:
    from perdure.networks.clip.torchscript import read_torchscript

    return read_torchscript(archive)


def test_making_a_table_draws_no_random_numbers(archive: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    text_table(["cat"], archive, dim=32)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("encoder", ["hash", "clip"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", " "], "class 2 has an empty name"),
        (["cat", "dog", "Cat"], "classes 1 and 3 are both called 'Cat'"),
    ],
)
def test_names_that_tell_no_class_apart_are_refused(
    archive: Path, encoder: str, names: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        text_table(names, archive if encoder == "clip" else encoder, dim=32)


def test_names_and_prompts_that_cannot_be_read_are_refused(archive: Path) -> None:
    with pytest.raises(UsageError, match="has 31 tokens, CLIP reads 20"):
        text_table(["x" * 28], archive, dim=32, templates=["a {}"])
    with pytest.raises(UsageError, match="the prompt 'a photo' has no single"):
        text_table(["cat"], archive, dim=32, templates=["a photo"])
    with pytest.raises(DataError, match="text vectors of length 32, the network takes 64"):
        text_table(["cat"], archive, dim=64)


def test_another_vocabulary_than_the_text_encoders_is_refused(archive: Path, tmp_path: Path) -> None:
    """transformers would make a tokenizer of two tokens of an empty folder, without a word."""
    short = tmp_path / "short.txt.gz"
    short.write_bytes(gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\nc a\n'))
    with pytest.raises(DataError, match="another vocabulary than the text encoder's: 515 tokens, not 518"):
        text_table(["cat"], archive, dim=32, vocabulary=short)
    with pytest.raises(DataError, match=r"vocab\.json"):
        text_table(["cat"], archive, dim=32, vocabulary=tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        text_table(["cat"], archive, dim=32, vocabulary=tmp_path / "nothing.gz")
    (tmp_path / "bad.txt.gz").write_bytes(gzip.compress(b"c a")[:-6])
    with pytest.raises(DataError, match="is no list of merges"):
        text_table(["cat"], archive, dim=32, vocabulary=tmp_path / "bad.txt.gz")
    (tmp_path / "vocab.json").write_text("[1, 2]")
    (tmp_path / "merges.txt").write_text("#version: 0.2\nc a\n")
    for content in ("[1, 2]", "3", "null", '{"c": "0"}', '{"c": 1, "a": 1}'):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(DataError, match="is no vocabulary of CLIP: tokens are not numbered from 0"):
            text_table(["cat"], archive, dim=32, vocabulary=tmp_path)


def test_a_description_makes_another_table_of_the_same_weights(published: Callable[[str], Path]) -> None:
    """It tells the activation: what was read from the file alone must not come out of the cache for its folder."""
    folder = published("open_clip")
    description = folder / "open_clip_config.json"
    config = json.loads(description.read_text())
    tables = []
    for quick in (True, False):
        config["model_cfg"]["quick_gelu"] = quick
        description.write_text(json.dumps(config))
        tables.append(text_table(["cat"], folder, dim=32))
    assert tables[0].weights == tables[1].weights and tables[0].reader != tables[1].reader
    assert not torch.equal(tables[0].vectors, tables[1].vectors)


@pytest.mark.parametrize("name", ["text_model.encoder.layers.9999.mlp.fc1.weight", "text_projection.weight"])
def test_a_text_encoder_that_no_weights_make_is_refused_before_it_is_built(
    archive: Path, tmp_path: Path, name: str
) -> None:
    state = dict(read_clip(archive).tensors)
    state[name] = torch.zeros(1, 1) if "layers" in name else torch.zeros(0, 32)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "clip.safetensors")
    with pytest.raises(DataError, match="holds no text encoder"):
        text_model(read_clip(tmp_path / "clip.safetensors"))


def test_an_image_encoder_alone_has_no_text(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "visual.safetensors"
    save_file({name: t for name, t in load_openai(archive).items() if name.startswith("visual.")}, path)
    with pytest.raises(DataError, match="holds no text encoder"):
        text_table(["cat"], path, dim=32, vocabulary=archive.parent / "bpe_simple_vocab_16e6.txt.gz")
    assert load_file(path)


def test_the_stand_in_is_the_same_everywhere_and_needs_no_file() -> None:
    table = text_table(["cat", "dog"], "hash", dim=64)
    assert (table.weights.source, table.weights.sha256, table.templates) == ("hash", None, ())
    assert table.vectors.dtype == torch.float32
    # recorded: a change would make old runs' tables differ
    assert table.vectors[0, :4].tolist() == pytest.approx([0.0532943, 0.1425208, 0.0141313, -0.1425208], abs=1e-6)


def test_the_stand_ins_cosines_look_like_clips() -> None:
    vectors = hash_vectors(class_names("ade20k"), 512)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(150))
    cosines = (vectors @ vectors.T)[~torch.eye(150, dtype=torch.bool)]
    assert cosines.mean().item() == pytest.approx(0.75, abs=0.02)
    assert cosines.max().item() < 0.99
    names = class_names("ade20k")
    alike = vectors[names.index("screen door")] @ vectors[names.index("door")]
    assert alike > vectors[names.index("screen door")] @ vectors[names.index("clock")] + 0.05


def test_a_row_of_the_stand_in_depends_on_its_name_alone() -> None:
    assert torch.equal(hash_vectors(["cat", "dog"], 40)[1], hash_vectors(["dog"], 40)[0])
    assert torch.equal(hash_vectors(["Cat"], 40), hash_vectors(["cat "], 40))
    assert hash_vectors([], 40).shape == (0, 40)
