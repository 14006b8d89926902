"""The pure functions of CGR: codecs, prompts, the loss, the segmenter's terms, and checks of pairs."""

from __future__ import annotations

from itertools import chain, combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from perdure.data.preparation import Preparation
from perdure.errors import DataError, UsageError
from perdure.files import write_tensors
from perdure.labels import IGNORE, label_space
from perdure.methods.cgr import bjd, codecs
from perdure.methods.cgr.pairs import Manifest, StoredPairs, check_causality, check_content, read_manifest
from perdure.methods.cgr.prompts import Card, card, draw_subsets, rows
from perdure.methods.cgr.sampling import agreement, area_bins, denoise, sound
from perdure.methods.cgr.terms import cross_entropy, rotated, soft_dice, standardised
from perdure.methods.past import halves, need_room
from perdure.streams.task import Task

ORDERS = {
    "cfp": ("cardiac", "fundus", "prostate"),
    "pfc": ("prostate", "fundus", "cardiac"),
}
CLASSES = {
    "cardiac": ("left_ventricle", "myocardium", "right_ventricle"),
    "fundus": ("optic_cup", "optic_disc"),
    "prostate": ("prostate",),
}


def cards(order: str) -> list[Card]:
    space, old, found = label_space([c for name in ORDERS[order] for c in CLASSES[name]]), (), []
    for index, name in enumerate(ORDERS[order]):
        new = tuple(space.id_of(c) for c in CLASSES[name])
        task = Task(index, name, new, old, frozenset(new), space=space)
        found.append(card(task, {}, {}))
        old += new
    return found


@pytest.mark.golden
@pytest.mark.parametrize(("order", "offsets"), [("cfp", [0, 3, 5]), ("pfc", [0, 1, 3])])
def test_offsets_of_both_orders(order: str, offsets: list[int]) -> None:
    for one, offset in zip(cards(order), offsets, strict=True):
        codes = torch.arange(one.classes + 1)
        assert codecs.to_global(codes, one.ids).tolist() == [0, *(code + offset for code in range(1, one.classes + 1))]


def every_subset(classes: int) -> list[tuple[int, ...]]:
    return list(chain.from_iterable(combinations(range(1, classes + 1), k) for k in range(classes + 1)))


@pytest.mark.parametrize("classes", [1, 2, 3, 6])
def test_masks_come_back_for_every_subset_of_labels(classes: int) -> None:
    for shown in every_subset(classes):
        codes = torch.tensor([0, *shown, 0, *shown]).view(1, 2, -1)
        coded = codecs.encode_mask(codes, classes)
        assert coded.min() >= -1 and coded.max() <= 1
        assert torch.equal(codecs.decode_mask(coded, classes), codes)
        assert torch.equal(codecs.decode_mask(coded + 0.99 / classes, classes), codes)  # half of a level's width
        assert codecs.members(int(codecs.subsets(codes, classes))) == shown
    assert codecs.encode_mask(torch.tensor([[[0, 1, 2, 3]]]), 3).flatten().tolist() == pytest.approx(
        [-1, -1 / 3, 1 / 3, 1]
    )


def test_what_is_not_annotated_is_background() -> None:
    labels = torch.tensor([[0, 4, 5, 6, 2, IGNORE]])
    codes = codecs.to_local(labels, (4, 6))
    assert codes.tolist() == [[0, 1, 0, 2, 0, 0]]
    assert codecs.to_global(codes, (4, 6)).tolist() == [[0, 4, 0, 6, 0, 0]]


def test_images_come_back_to_within_half_a_level() -> None:
    ends = ((-2.0, 0.0), (2.0, 1.0))
    images = torch.stack([torch.linspace(-2, 2, 64).view(8, 8), torch.linspace(0, 1, 64).view(8, 8)])[None]
    coded = codecs.encode_image(images, ends)
    assert float(coded.min()) == -1 and float(coded.max()) == 1
    back = codecs.from_bytes(codecs.to_bytes(coded), ends)
    assert (back - images).abs().amax((0, 2, 3)).tolist() <= [4 / 510 + 1e-6, 1 / 510 + 1e-6]
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 2, 16, 16)
    again = codecs.to_bytes(codecs.encode_image(codecs.from_bytes(stored, ends), ends))
    assert torch.equal(again, stored)  # a pair that is learned from and made again does not drift
    assert codecs.encode_image(torch.full((1, 2, 1, 1), 9.0), ends).flatten().tolist() == [1, 1]


def test_published_coding_confuses_classes() -> None:
    """Q11: what a value means depends on the other labels of the mask."""
    found = codecs.stretched(torch.tensor([[[0, 1]], [[0, 3]]]))
    assert found.flatten().tolist() == [-1, 1, -1, 1]
    assert codecs.stretched(torch.tensor([[[0, 1, 3]]])).flatten().tolist() == pytest.approx([-1, -1 / 3, 1])
    assert codecs.stretched(torch.zeros(1, 1, 2)).flatten().tolist() == [0, 0]
    assert codecs.stretched(torch.full((1, 1, 2), 2)).flatten().tolist() == [-2, -2]


def test_majority_takes_thin_rims_away() -> None:
    codes = torch.zeros(1, 6, 6, dtype=torch.int64)
    codes[0, 1:5, 1:5] = 3
    codes[0, 3, 3] = 1
    assert codecs.majority(codes, 3)[0, 3, 3] == 3
    assert torch.equal(codecs.majority(torch.zeros_like(codes), 3), torch.zeros_like(codes))


@pytest.mark.golden
def test_published_prompts() -> None:
    cardiac, fundus, prostate = cards("cfp")
    assert cardiac.prompt(0b111) == (
        "A magnetic resonance of cardiac with a left ventricle, a myocardium, a right ventricle"
    )
    assert cardiac.prompt(0b100) == "A magnetic resonance of cardiac with a right ventricle"
    assert cardiac.prompt(0) == "A magnetic resonance of cardiac with "
    assert fundus.prompt(0b11) == "A fundus photography with a optic cup, a optic disc"
    assert cardiac.full_prompt().endswith("with a left ventricle, a myocardium and a right ventricle")
    assert prostate.full_prompt() == prostate.prompt(1) == "A magnetic resonance of a prostate"
    assert [len(one.prompts()) for one in (cardiac, fundus, prostate)] == [8, 4, 2]
    assert rows([cardiac, fundus, prostate]) == [0, 9, 14, 17]


def test_prompts_of_other_tasks() -> None:
    space = label_space(["part_0", "part_1"])
    few = Task(0, "knee-mr", (1, 2), (), frozenset((1, 2)), space=space)
    assert card(few, {}, {}).prompt(3) == "An image of knee mr with a part 0, a part 1"
    named = card(few, {"knee-mr": "A knee with"}, {"part_1": "the patella"})
    assert named.prompt(3) == "A knee with a part 0, the patella"
    again = Task(1, "b", (), (1, 2), frozenset((2,)), space=space)
    assert card(again, {}, {}).ids == (2,)


def test_prompts_are_drawn_as_often_as_they_were_counted() -> None:
    torch.manual_seed(0)
    drawn = torch.bincount(draw_subsets(torch.tensor([0, 100, 0, 300]), 4000), minlength=4)
    assert drawn[0] == drawn[2] == 0
    assert drawn[3] / drawn[1] == pytest.approx(3, rel=0.15)


@pytest.mark.golden
@pytest.mark.parametrize(("step", "expected"), [(0, 0.9974), (1, 1.3963)])
def test_loss_of_a_fresh_network(step: int, expected: float) -> None:
    torch.manual_seed(0)
    pairs, times = torch.rand(4, 4, 256, 256) * 2 - 1, bjd.draw_times(4, torch.device("cpu"))
    made = bjd.passes(pairs, times, bjd.clean_parts("alternate", step))
    terms = bjd.losses(torch.zeros_like(made.inputs), made)
    assert float(terms["joint"]) == pytest.approx(0.79788, abs=0.003)
    assert float(sum(terms.values())) == pytest.approx(expected, abs=0.003)


def test_conditional_passes_leave_one_part_as_it_is() -> None:
    torch.manual_seed(0)
    pairs, times = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    made = bjd.passes(pairs, times, ("image", "mask"))
    assert made.passes == 3 and made.inputs.shape == (9, 4, 8, 8)
    assert torch.equal(made.times, times.repeat(3))
    joint, image, mask = made.inputs.chunk(3)
    noise, of_mask, of_image = made.targets.chunk(3)
    assert torch.equal(image[:, :3], pairs[:, :3]) and not of_mask[:, :3].any()
    assert torch.equal(mask[:, 3:], pairs[:, 3:]) and not of_image[:, 3:].any()
    assert not torch.equal(joint[:, :3], pairs[:, :3]) and of_mask[:, 3:].any() and of_image[:, :3].any()
    assert not torch.equal(noise[:, :3], of_image[:, :3])  # noises of their own
    # a perfect answer costs nothing, and the clean part is in the mean
    assert float(sum(bjd.losses(made.targets, made).values())) == 0
    off = torch.zeros_like(made.targets)
    off[3:6, :3] = 1.0
    assert float(bjd.losses(made.targets + off, made)["conditional"]) == pytest.approx(0.75 / 2)


def test_which_part_is_clean() -> None:
    assert [bjd.clean_parts("alternate", step) for step in range(3)] == [("image",), ("mask",), ("image",)]
    assert bjd.clean_parts("both", 5) == ("image", "mask")
    assert bjd.clean_parts("none", 5) == ()
    torch.manual_seed(0)
    assert {bjd.clean_parts("random", 0) for _ in range(20)} == {("image",), ("mask",)}


def test_dice_of_absent_classes() -> None:
    channels = torch.zeros(1, 4, 4, dtype=torch.int64)
    channels[0, :2] = 6
    logits = torch.full((1, 7, 4, 4), -20.0).scatter(1, channels[:, None], 20.0)
    assert float(soft_dice(logits, channels)) < 1e-3  # saturated: no mass is left for the others
    softer = torch.full((1, 7, 4, 4), -4.0).scatter(1, channels[:, None], 4.0)
    assert float(soft_dice(softer, channels)) > 0.7
    assert float(soft_dice(softer, channels, "ignore")) < 0.02
    unknown = channels.masked_fill(channels == 0, -1)
    assert float(cross_entropy(logits, unknown)) < 1e-6
    assert float(cross_entropy(logits, torch.full_like(channels, -1))) == 0


def test_turned_labels_are_old_ones_and_stay_with_their_image() -> None:
    torch.manual_seed(0)
    labels = torch.zeros(8, 32, 32, dtype=torch.int64)
    labels[:, 8:24, 10:20] = 6
    images = (labels == 6).float()[:, None].expand(8, 3, 32, 32)
    turned, found = rotated(images, labels, 1.0)
    assert set(found.unique().tolist()) == {0, 6}
    assert not torch.equal(found, labels)
    assert (((turned[:, 0] > 0.5) == (found == 6)).float().mean()) > 0.99
    assert found[0].bool().sum() == pytest.approx(int(labels[0].bool().sum()), rel=0.1)
    same = rotated(images, labels, 0.0)
    assert same[0] is images and same[1] is labels


def test_images_are_standardised_over_their_channels_together() -> None:
    images = torch.randn(2, 3, 8, 8) * 5 + torch.tensor([1.0, 2, 3]).view(3, 1, 1)
    flat = standardised(images).flatten(1)
    assert torch.allclose(flat.mean(1), torch.zeros(2), atol=1e-5)
    assert torch.allclose(flat.std(1), torch.ones(2), atol=1e-5)
    assert torch.allclose(standardised(images), standardised(images * 3 - 7), atol=1e-4)
    assert standardised(torch.ones(1, 1, 4, 4)).isfinite().all()


def test_checks_of_masks() -> None:
    real = torch.zeros(4, 16, 16, dtype=torch.int64)
    real[:, 4:10, 4:10] = 1
    real[:, 5:7, 5:7] = 2
    areas = area_bins(real, 2)
    assert areas.sum(1).tolist() == [4, 4]
    odd = real.repeat(2, 1, 1)[:5].clone()
    odd[1] = 0  # nothing
    odd[2, 4:10, 4:10] = 2  # far larger than any
    odd[3, 0, 15] = odd[3, 0, 12] = odd[3, 15, 15] = 1  # in pieces
    odd[4] = real[0].where(real[0] == 1, 0)  # one class alone is no fault
    odd[4, 5:7, 5:7] = 1
    assert sound(odd, areas).tolist() == [True, False, False, False, True]


def test_agreement_of_two_masks() -> None:
    one = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 0]], [[1, 1, 0, 0]], [[3, 3, 0, 0]]])
    two = torch.tensor([[[0, 1, 2, 2]], [[0, 0, 0, 0]], [[0, 0, 2, 0]], [[3, 3, 0, 0]]])
    assert agreement(one, two, 3).tolist() == pytest.approx([2 / 3, 1, 0, 1])


def test_only_pairs_of_earlier_stages_by_the_generator_of_the_time() -> None:
    hashes = torch.arange(3 * 32, dtype=torch.uint8).view(3, 32)

    def made(stage: int, by: int) -> Manifest:
        return Manifest(stage, 0, 0, hashes[by], codecs.VERSION, torch.zeros(1), torch.zeros(2), 1, 1, 1.0)

    check_causality([made(0, 0), made(1, 1)._replace(file=1)], 0, 2, hashes)
    of_three, of_none = (2, 2, "the generator of task 3"), (-1, 2, "the generator of task 0")
    bad = (of_three, of_none, (1, 0, "another generator"), (1, 2, "another"))
    for stage, by, words in bad:
        with pytest.raises(DataError, match=words):
            check_causality([made(stage, by)], 0, 2, hashes)
    with pytest.raises(DataError, match="version 0 of the coding"):
        check_causality([made(0, 0)._replace(codec=0)], 0, 2, hashes)
    with pytest.raises(DataError, match="file 1 of pairs of task 1 stands for file 1 of task 2"):
        check_causality([made(0, 0)], 1, 2, hashes)
    with pytest.raises(DataError, match="file 1 of pairs of task 1 stands for file 2 of task 1"):
        check_causality([made(0, 0), made(0, 0)], 0, 2, hashes)


@pytest.mark.parametrize(
    ("images", "codes"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)),
        (torch.zeros(2, 3, 4, 5, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)),
        (torch.zeros(2, 3, 5, 5, dtype=torch.uint8), torch.zeros(2, 5, 5, dtype=torch.uint8)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 4, 4, dtype=torch.uint8)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((2, 4, 4), 3, dtype=torch.uint8)),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.full((2, 4, 4), -300, dtype=torch.int16)),
    ],
    ids=["channels", "width", "size", "float", "number", "class", "type"],
)
def test_files_that_hold_no_pairs(images: torch.Tensor, codes: torch.Tensor, tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"images": images, "labels": codes})
    with pytest.raises(
        DataError, match=r"a\.safetensors does not hold pairs of 2 classes in images of 3 channels and 4 "
    ):
        check_content(tmp_path / "a.safetensors", 3, 2, (4, 4))


def test_files_that_hold_more_than_pairs(tmp_path: Path) -> None:
    images, codes = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 4, 4, dtype=torch.uint8)
    write_tensors(tmp_path / "a.safetensors", {"images": images, "labels": codes, "raw": images})
    with pytest.raises(DataError, match="holds more than pairs: 'raw'"):
        check_content(tmp_path / "a.safetensors", 3, 2, (4, 4))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("stage", torch.zeros(2, dtype=torch.int64), "number"),
        ("task", torch.tensor(0.5), "number"),
        ("codec", torch.zeros(1, 1, dtype=torch.int64), "number"),
        ("fit", torch.tensor(1), "fraction"),
        ("generator", torch.tensor(3), "list"),
        ("histogram", torch.zeros(2, 2, dtype=torch.int64), "list"),
    ],
)
def test_manifests_that_no_run_writes(name: str, value: torch.Tensor, wanted: str, tmp_path: Path) -> None:
    some = torch.zeros(3, dtype=torch.int64)
    sound = Manifest(0, 0, 0, torch.zeros(32, dtype=torch.uint8), 1, some, some, 3, 3, 0.5).tensors()
    write_tensors(tmp_path / "a.safetensors", sound)
    assert read_manifest(tmp_path / "a.safetensors").fit == 0.5
    write_tensors(tmp_path / "a.safetensors", sound | {f"manifest.{name}": value})
    with pytest.raises(DataError, match=rf"a\.safetensors: 'manifest.{name}' is no {wanted}"):
        read_manifest(tmp_path / "a.safetensors")


def test_halves_of_a_batch() -> None:
    assert halves(16, 0) == (16, 0)
    assert halves(16, 2) == (8, 8)
    assert halves(5, 1) == (3, 2)
    need_room(2)
    with pytest.raises(UsageError, match="batch of 1"):
        need_room(1)


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
def test_sampling_finds_the_pair_of_a_network_that_knows_it_and_goes_on_after_a_stop(sampler: str) -> None:
    from perdure.networks.joint_diffusion.noise import kept_signal

    wanted = torch.linspace(-0.9, 0.9, 2 * 4 * 4).view(1, 2, 4, 4)

    def network(pairs: torch.Tensor, times: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        share = kept_signal()[times].view(-1, 1, 1, 1)
        return (pairs - share.sqrt() * wanted) / (1 - share).sqrt()

    start = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    saved: list[dict[str, object]] = []
    progress = SimpleNamespace(saved=None, checkpoint=lambda done, of, note, state: saved.append(state()))
    made = denoise(network, start, torch.zeros(3, 1, 1), None, sampler, 10, progress=progress)  # type: ignore[arg-type]
    assert torch.allclose(made, wanted.expand(3, 2, 4, 4), atol=0.02)
    assert len(saved) == 9
    for state in (saved[0], saved[4], saved[8]):
        again = SimpleNamespace(saved=state, checkpoint=lambda *_: None)
        assert torch.equal(denoise(network, start, torch.zeros(3, 1, 1), None, sampler, 10, progress=again), made)  # type: ignore[arg-type]


def test_black_and_white_of_preparations() -> None:
    from perdure.data.preparation import ClassImage

    assert Preparation(channels=2).ends == ((-1.0, -1.0), (1.0, 1.0))
    shown = ClassImage(channels=1, patch=(8, 8), mean=(0.5,), std=(0.25,))
    assert shown.ends == ((-2.0,), (2.0,))
    assert Preparation().mirrors == () and shown.mirrors == (1,)


def test_stored_pairs_are_mirrored_as_their_task_is() -> None:
    from perdure.data.case import Case

    image, label = torch.arange(16, dtype=torch.uint8).view(1, 4, 4), torch.arange(16).view(4, 4) % 3
    given = {"channels": 1, "black": (0.0,), "white": (255.0,), "ids": (5, 9)}
    seen = {axes: set() for axes in ((), (1,), (0, 1))}
    for axes, found in seen.items():
        for seed in range(20):
            torch.manual_seed(seed)
            case = StoredPairs(**given, axes=axes).train(Case(image, label, "a"))
            found.add(tuple(case.image.flatten().tolist()))
            where = case.image[0].long().flatten()
            assert torch.equal(
                case.label.flatten(), torch.tensor([0, 5, 9])[where % 3]
            )  # labels stay with their pixels
    assert [len(found) for found in seen.values()] == [1, 2, 3]
