"""Binary cross-entropy by class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perdure.config.build import method_class
from perdure.data.case import annotation_table
from perdure.errors import PerdureError
from perdure.labels import IGNORE, TABLE_SIZE
from perdure.methods.losses import channels_of, class_bce, negative_bce


def plain(logits, labels, ids, pos_weight):
    """The definition, class by class."""
    weight = torch.tensor(pos_weight)
    return torch.stack(
        [
            F.binary_cross_entropy_with_logits(logits[:, k], (labels == c).float(), pos_weight=weight)
            for k, c in enumerate(ids)
        ]
    )


@pytest.mark.golden
def test_current_bce_golden(wave, lab):
    loss = class_bce(wave((2, 3, 64, 64), 0.37, 0.1, 3), lab, (3, 4, 5), pos_weight=4.0)
    torch.testing.assert_close(loss, torch.tensor([2.0631156, 1.5114743, 1.1479011]), rtol=1e-5, atol=0)


@pytest.mark.golden
def test_replay_bce_golden(wave):
    loss = negative_bce(wave((1, 3, 7, 1), 0.71, 0.2, 2))
    torch.testing.assert_close(loss, torch.tensor([1.0964520, 1.1099216, 0.8824064]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 9, 7), (2, 3, 5, 6, 4)])
@pytest.mark.parametrize("pos_weight", [1.0, 4.0, 30.0])
def test_value_and_gradient_equal_the_definition(shape, pos_weight):
    torch.manual_seed(0)
    labels = torch.tensor([0, 7, 2, 9, 1, IGNORE])[torch.randint(6, (shape[0], *shape[2:]))]
    ours = (4 * torch.randn(shape)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.tensor([0.3, 1.0, 2.0])
    loss, expected = class_bce(ours, labels, (7, 2, 9), pos_weight), plain(theirs, labels, (7, 2, 9), pos_weight)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8)


def test_extreme_logits_are_finite():
    logits = torch.tensor([[[1e4, -1e4, 1e4, -1e4]]], requires_grad=True)
    loss = class_bce(logits, torch.tensor([[1, 1, 0, 0]]), (1,), 4.0)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([(4e4 + 1e4) / 4]))
    assert torch.isfinite(logits.grad).all()


def test_ignored_pixels_can_be_left_out(wave, lab):
    logits = wave((2, 3, 64, 64), 0.37, 0.1, 3).requires_grad_()
    loss = class_bce(logits, lab, (3, 4, 5), 4.0, ignore_as_negative=False)
    valid = lab != IGNORE
    picked = logits.movedim(1, -1)[valid].t()[None]
    torch.testing.assert_close(loss, plain(picked, lab[valid][None], (3, 4, 5), 4.0))
    loss.sum().backward()
    assert not logits.grad.movedim(1, -1)[~valid].any()
    assert logits.grad.movedim(1, -1)[valid].any()


def test_only_ignored_pixels_give_zero():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = class_bce(logits, torch.full((1, 4, 4), IGNORE), (1, 2), ignore_as_negative=False)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and not logits.grad.any()


def test_class_order_and_ids_do_not_matter(wave, lab):
    logits = wave((2, 3, 64, 64), 0.37, 0.1, 3)
    natural = class_bce(logits, lab, (3, 4, 5), 4.0)
    permuted = class_bce(logits[:, [2, 0, 1]], lab, (5, 3, 4), 4.0)
    assert torch.equal(permuted, natural[[2, 0, 1]])
    table = torch.arange(TABLE_SIZE)
    table[[3, 4, 5]] = torch.tensor([90, 12, 41])
    assert torch.equal(class_bce(logits, table[lab], (90, 12, 41), 4.0), natural)


def test_channels_of_labels():
    labels = torch.tensor([[0, 3, 9], [IGNORE, 1, 3]])
    assert channels_of(labels, (9, 3)).tolist() == [[-1, 1, 0], [-1, -1, 1]]
    assert channels_of(labels, (0, 9, 3)).tolist() == [[0, 2, 1], [-1, -1, 2]]


def test_shapes_that_do_not_fit_are_told(lab):
    with pytest.raises(PerdureError, match=r"logits .* do not fit labels"):
        class_bce(torch.zeros(1, 3, 64, 64), lab, (3, 4, 5))
    with pytest.raises(PerdureError, match="2 classes"):
        class_bce(torch.zeros(2, 3, 64, 64), lab, (3, 4))
    with pytest.raises(PerdureError, match="axes"):
        class_bce(torch.zeros(2, 3, 8, 8, 8), lab, (3, 4, 5))


@pytest.mark.parametrize(
    ("small", "size"), [((5, 3), (20, 12)), ((4, 6), (4, 18)), ((2, 3, 4), (6, 6, 8)), ((7,), (21,))]
)
@pytest.mark.parametrize("keep", [True, False])
def test_small_logits_are_upsampled(small, size, keep, monkeypatch):
    monkeypatch.setattr("perdure.methods.losses.PIECE_ON_CPU", 1)  # one image at a time
    torch.manual_seed(0)
    labels = torch.tensor([0, 7, 2, 9, IGNORE])[torch.randint(5, (3, *size))]
    ours = (4 * torch.randn(3, 3, *small)).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    full = F.interpolate(theirs, size, mode=mode, align_corners=False)
    loss, expected = (class_bce(z, labels, (7, 2, 9), 4.0, keep) for z in (ours, full))
    for value in (loss, expected):
        (value * torch.tensor([1.0, 0.5, 2.0])).sum().backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("piece", [1, 2 * 3 * 64 * 64, 1 << 30])
def test_pieces_do_not_matter(wave, lab, piece, monkeypatch):
    monkeypatch.setattr("perdure.methods.losses.PIECE_ON_CPU", piece)
    loss = class_bce(wave((2, 3, 64, 64), 0.37, 0.1, 3), lab, (3, 4, 5), pos_weight=4.0)
    torch.testing.assert_close(loss, torch.tensor([2.0631156, 1.5114743, 1.1479011]), rtol=1e-5, atol=0)


def test_without_gradients(lab):
    logits = torch.randn(2, 3, 64, 64, requires_grad=True)
    with torch.no_grad():
        loss = class_bce(logits, lab, (3, 4, 5))
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(logits.detach(), lab, (3, 4, 5), 1.0))


def test_negative_bce_over_a_mask():
    torch.manual_seed(0)
    logits, where = torch.randn(2, 3, 4, 5, 6), torch.rand(2, 4, 5, 6) < 0.3
    picked = logits.movedim(1, -1)[where].t()[None]
    torch.testing.assert_close(negative_bce(logits, where), negative_bce(picked))
    nothing = negative_bce(logits.requires_grad_(), torch.zeros_like(where))
    nothing.sum().backward()
    assert nothing.tolist() == [0.0] * 3 and not logits.grad.any()


def test_half_precision_logits_are_computed_in_float32(lab):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 64, 64).bfloat16()
    loss = class_bce(logits, lab, (3, 4, 5), 4.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, class_bce(logits.float(), lab, (3, 4, 5), 4.0))


# Images that do not label every class -----------------------------------------------------------------------------


@pytest.mark.parametrize("keep_ignored", [True, False])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 3, 4, 8, 8)])
def test_unlabelled_classes_by_definition(shape: tuple[int, ...], keep_ignored: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator, requires_grad=True)
    labels = torch.tensor([0, 7, 2, IGNORE])[torch.randint(4, (shape[0], *shape[2:]), generator=generator)]
    ids, known = (7, 2, 9), [{7, 2, 9}, {2}, {7}][: shape[0]]
    found = class_bce(logits, labels, ids, 3.0, keep_ignored, annotation_table(known))
    expected = []
    for k, c in enumerate(ids):
        counts = torch.stack([
            ((lab != 0) & (lab != IGNORE) | torch.tensor(c in said)) & ((lab != IGNORE) | torch.tensor(keep_ignored))
            for lab, said in zip(labels, known, strict=True)
        ])  # fmt: skip
        each = F.binary_cross_entropy_with_logits(
            logits[:, k], (labels == c).float(), pos_weight=torch.tensor(3.0), reduction="none"
        )
        expected.append(each[counts].sum() / counts.sum().clamp_min(1))
    torch.testing.assert_close(found, torch.stack(expected))
    (slope,) = torch.autograd.grad(found.sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(torch.stack(expected).sum(), logits)
    torch.testing.assert_close(slope, wanted)


def test_a_class_that_no_pixel_can_tell_has_no_loss() -> None:
    logits = torch.full((1, 2, 4, 4), 50.0, requires_grad=True)
    loss = class_bce(logits, torch.zeros(1, 4, 4, dtype=torch.int64), (1, 2), annotated=annotation_table([(1,)]))
    assert loss[0] > 49 and loss[1] == 0
    loss.sum().backward()
    assert logits.grad is not None and not logits.grad[:, 1].any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("finetune", {"unlabelled": "left_out"}),
        ("joint", {}),
        ("lwf", {}),
        ("lwf", {"form": "softmax"}),
        ("independent", {}),
        ("star", {}),
    ],
)
def test_methods_do_not_push_a_class_down_where_it_may_be(make_blocks, make_setup, first_batch, name, options) -> None:
    """On background of images that label class 2 alone, the classifiers of the others get no gradient."""
    kind = method_class(name)
    stream = make_blocks([(2, 3, 1)])
    method = kind(make_setup(kind.Options(**options)))
    (task,) = stream.tasks
    with stream.opened(task):
        method.begin(task)
        phase = next(p for p in method.phases(task) if p.name == "train")
        batch = first_batch(phase.data())
    labels = torch.where(batch.labels == 2, 2, 0)
    method.train()
    for annotated, moved in ((annotation_table([(2,)] * len(labels)), False), (None, True)):
        method.zero_grad()
        terms = phase.loss(batch._replace(labels=torch.zeros_like(labels), annotated=annotated))
        torch.stack(list(terms.values())).sum().backward()
        network = method.networks[0] if name == "independent" else method.network
        slope = network.classifiers[0].bias.grad
        assert slope[0] != 0 and (slope[1:].abs() > 1e-7).any() == (moved or options.get("form") == "softmax")
        assert options.get("form") != "softmax" or moved or (slope[1:] < 0).all()  # what is not 2 may be 3 or 1


# Half precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_class", [False, True])
def test_masked_means_are_float32_under_autocast(by_class: bool) -> None:
    """A product would be taken in bfloat16, with three digits; in fp16 a sum over a batch overflows."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 3, 64, 64, generator=generator) * 4
    where = torch.rand(8, *([3] if by_class else []), 64, 64, generator=generator) < 0.7
    plain = negative_bce(logits, where)
    with torch.autocast("cpu", torch.bfloat16):
        found = negative_bce(logits, where)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)


def test_class_bce_is_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 4, (2, 64, 64), generator=generator)
    plain = class_bce(logits, labels, (1, 2, 3), 4.0)
    with torch.autocast("cpu", torch.bfloat16):
        found = class_bce(logits, labels, (1, 2, 3), 4.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
