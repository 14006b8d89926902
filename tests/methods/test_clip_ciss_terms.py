"""The loss terms and pseudo masks of CLIP-CISS: golden numbers and the invariances of its specification (section 7)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perdure.labels import IGNORE
from perdure.methods.clip_ciss.gpd import global_loss, pixel_weights, region_means, relation_loss
from perdure.methods.clip_ciss.regions import Regions, believed, labelled
from perdure.methods.clip_ciss.terms import (
    dice,
    focal,
    mask_losses,
    masks_per_process,
    presence_loss,
    query_distillation,
)


def disc(index: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    return (y - 8 * (index % 3) - 6) ** 2 + (x - 7 * (index % 4) - 5) ** 2 < 30 + 20 * index


@pytest.fixture
def targets() -> Regions:
    """Image 0 shows classes 3 and 4, image 1 class 4; five classes."""
    masks = torch.stack([disc(0), disc(1), disc(2)])
    return Regions(torch.tensor([0, 0, 1]), torch.tensor([3, 4, 4]), masks)


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=1)


# The labels' terms -----------------------------------------------------------------------------------------------


@pytest.mark.golden
def test_focal_and_dice_golden(wave):
    logits = wave((3, 64), 0.37, 0, 3)
    wanted = ((0.53 * torch.arange(192, dtype=torch.float64)).cos() > 0).float().view(3, 64)
    assert float(focal(logits, wanted, 2)) == pytest.approx(0.6157058, rel=1e-5)
    assert float(dice(logits, wanted, 2)) == pytest.approx(0.7146866, rel=1e-5)


@pytest.mark.golden
def test_presence_golden(wave, targets):
    logits = wave((2, 5, 2), 0.7, 0, 2)
    shown = torch.zeros(2, 5, dtype=torch.bool)
    shown[targets.images, targets.columns] = True
    assert float(presence_loss(logits, shown)) == pytest.approx(0.9819435, rel=1e-5)
    assert float(presence_loss(logits[:, 3:], shown[:, 3:])) == pytest.approx(1.0103247, rel=1e-5)


@pytest.mark.golden
def test_query_distillation_golden(wave):
    found = query_distillation(wave((3, 2, 5, 16), 0.13), wave((3, 2, 3, 16), 0.17, 0.4))
    assert float(found) == pytest.approx(18.0019493, rel=1e-5)


def test_presence_counts_only_what_labels_tell():
    logits, shown = torch.randn(2, 3, 2), torch.tensor([[True, False, False], [False, True, False]])
    counted = torch.tensor([[True, True, False], [False, True, False]])
    by_hand = F.cross_entropy(logits[counted], (~shown[counted]).long())
    torch.testing.assert_close(presence_loss(logits, shown, counted), by_hand)
    assert float(presence_loss(logits, shown, torch.zeros_like(counted))) == 0.0


def test_gathering_before_upsampling_changes_nothing(targets):
    torch.manual_seed(0)
    maps = [torch.randn(2, 5, 8, 8, requires_grad=True) for _ in range(3)]
    loss = sum(mask_losses(maps, targets, torch.tensor(3.0)))
    loss.backward()
    expected = torch.zeros(())
    plain = [m.detach().clone().requires_grad_() for m in maps]
    for logits in plain:
        full = F.interpolate(logits, (32, 32), mode="bilinear", align_corners=False)
        few, wanted = full[targets.images, targets.columns].flatten(1), targets.masks.flatten(1).float()
        expected = expected + focal(few, wanted, 3) + dice(few, wanted, 3)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(maps, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)
        assert not ours.grad[:, :3].any(), "masks of classes that no label shows get no gradient"


def test_masks_at_the_size_of_the_logits_are_taken_as_they_are():
    logits = torch.randn(1, 1, 4, 6, 5)  # a volume
    region = Regions(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.rand(1, 4, 6, 5) > 0.5)
    found, _ = mask_losses([logits], region, torch.tensor(1.0))
    torch.testing.assert_close(found, focal(logits.flatten(1), region.masks.flatten(1).float(), 1))


def test_no_masks_give_no_loss():
    none = labelled(torch.zeros(2, 8, 8, dtype=torch.long), (1, 2))
    assert [float(part) for part in mask_losses([torch.randn(2, 2, 4, 4)], none, masks_per_process(none))] == [0, 0]
    assert float(masks_per_process(none)) == 1.0


def test_labelled_regions():
    labels = torch.tensor([[[7, 7, 0], [IGNORE, 2, 2]], [[0, 0, 9], [9, 9, 9]]])
    regions = labelled(labels, (2, 4, 7))
    assert regions.images.tolist() == [0, 0] and regions.columns.tolist() == [0, 2]
    assert torch.equal(regions.masks, torch.stack([labels[0] == 2, labels[0] == 7]))


def test_query_distillation_leaves_the_teacher_and_new_queries_alone():
    student, teacher = torch.randn(3, 2, 5, 4, requires_grad=True), torch.randn(3, 2, 3, 4, requires_grad=True)
    query_distillation(student, teacher).backward()
    assert teacher.grad is None and student.grad[:, :, :3].all() and not student.grad[:, :, 3:].any()
    assert query_distillation(student, teacher[:, :, :0]).item() == 0.0


# GPD -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("small", "size"), [((8, 8), (32, 32)), ((5, 7), (32, 32)), ((3, 4, 2), (9, 8, 6))])
def test_region_means_equal_those_of_the_upsampled_map(small, size):
    torch.manual_seed(0)
    features = torch.randn(2, 6, *small, requires_grad=True)
    images, masks = torch.tensor([0, 1, 1]), torch.rand(3, *size) > 0.6
    ours = region_means(features, images, pixel_weights(masks, features.shape[2:]))
    mode = "bilinear" if len(size) == 2 else "trilinear"
    full = F.interpolate(features, size, mode=mode, align_corners=False)
    picked = full[images] * masks.unsqueeze(1)
    expected = picked.flatten(2).sum(2) / masks.flatten(1).sum(1, keepdim=True)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(ours.square().sum(), features, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.square().sum(), features)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def plain_relation(features: Tensor, old: Tensor, text: Tensor, regions: Regions) -> Tensor:
    """The definition for images that are looked at together, class by class on upsampled maps."""
    total = torch.zeros(())
    for column in regions.columns.unique().tolist():
        prototypes = []
        for maps in (features, old):
            full = F.interpolate(maps, regions.masks.shape[1:], mode="bilinear", align_corners=False)
            chosen = (regions.columns == column).nonzero()[:, 0].tolist()
            means = [full[regions.images[k]][:, regions.masks[k]].mean(1) for k in chosen]
            prototypes.append(F.normalize(torch.stack(means).mean(0), dim=0))
        total = total + (text @ (prototypes[0] - prototypes[1])).square().sum()
    return total


def test_relations_equal_the_definition(targets):
    torch.manual_seed(0)
    features, old, text = unit(2, 16, 8, 8).requires_grad_(), unit(2, 16, 8, 8), unit(5, 16)
    loss = relation_loss(features, old, text, targets)
    expected = plain_relation(features, old, text, targets)
    assert expected > 0.01
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    (ours,) = torch.autograd.grad(loss, features)
    (theirs,) = torch.autograd.grad(expected, features)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_relations_do_not_depend_on_the_batch_size(targets):
    torch.manual_seed(0)
    features, old, text = unit(2, 16, 8, 8), unit(2, 16, 8, 8), unit(5, 16)
    twice = Regions(torch.cat([targets.images, targets.images + 2]), *(torch.cat([p, p]) for p in targets[1:]))
    double = relation_loss(torch.cat([features, features]), torch.cat([old, old]), text, twice)
    torch.testing.assert_close(double, relation_loss(features, old, text, targets))
    together = relation_loss(torch.cat([features, features]), torch.cat([old, old]), text, twice, chunk=4)
    torch.testing.assert_close(together, double)  # the same images twice have the same prototypes
    assert not torch.isclose(relation_loss(features, old, text, targets, chunk=1), double)


def test_distillation_is_zero_for_the_same_model_and_moves_the_student_only(targets):
    torch.manual_seed(0)
    features, old = unit(2, 16, 8, 8).requires_grad_(), unit(2, 16, 8, 8).requires_grad_()
    images, before, text = unit(2, 16).requires_grad_(), unit(2, 16).requires_grad_(), unit(5, 16).requires_grad_()
    assert float(relation_loss(features, features.detach(), text, targets)) == 0.0
    assert float(global_loss(images, images.detach(), text)) == pytest.approx(0.0, abs=1e-6)
    apart = relation_loss(features, old, text, targets) + global_loss(images, before, text)
    apart.backward()
    assert float(apart) > 0 and features.grad.any() and images.grad.any()
    assert old.grad is None and before.grad is None and text.grad is None


def test_the_temperature_makes_the_global_term_felt():
    torch.manual_seed(0)
    now, before, text = unit(4, 16), unit(4, 16), unit(9, 16)
    by_hand = F.kl_div((now @ text.t()).log_softmax(1), (before @ text.t()).softmax(1), reduction="batchmean")
    torch.testing.assert_close(global_loss(now, before, text), by_hand, rtol=1e-4, atol=1e-6)
    assert global_loss(now, before, text, 0.1) > 10 * global_loss(now, before, text)


def test_images_without_regions_count_nothing_in_relations():
    none = labelled(torch.zeros(3, 16, 16, dtype=torch.long), (1, 2))
    assert float(relation_loss(unit(3, 8, 4, 4), unit(3, 8, 4, 4), unit(2, 8), none)) == 0.0


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_lose_region_weights(kind):
    """A weight of 1 / 262144 is zero or subnormal in fp16; the mean of ones has to stay one."""
    masks = torch.ones(1, 512, 512, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = pixel_weights(masks, torch.Size((32, 32)))
        means = region_means(torch.ones(1, 3, 32, 32, dtype=kind), torch.zeros(1, dtype=torch.long), weights)
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, torch.ones(1, 3), rtol=1e-5, atol=1e-5)


# Pseudo masks ----------------------------------------------------------------------------------------------------


def halves(left: float, right: float) -> Tensor:
    """A mask map ``(4, 4)``."""
    return torch.cat([torch.full((4, 2), left), torch.full((4, 2), right)], 1)


def test_pseudo_masks_with_a_threshold():
    """Class 0 owns the left half, class 1 the right one; class 2 is not present, class 3 is outdone everywhere."""
    maps = torch.stack([halves(4, -4), halves(-4, 4), halves(9, 9), halves(3.9, -5)])[None]
    presence = torch.tensor([[0.9, 0.8, 0.5, 0.6]])
    taken = torch.zeros(1, 4, 4, dtype=torch.bool)
    taken[0, 0] = True
    found = believed(presence, maps, taken, threshold=0.5)
    assert found.columns.tolist() == [0, 1] and found.images.tolist() == [0, 0]
    wanted = torch.zeros(4, 4, dtype=torch.bool)
    wanted[1:, :2] = True
    assert torch.equal(found.masks, torch.stack([wanted, wanted.flip(1)]))


def test_the_published_threshold_accepts_a_class_that_owns_more_than_half_of_the_image():
    taken = torch.zeros(2, 4, 4, dtype=torch.bool)
    maps = torch.stack([halves(-1, -1), halves(-4, -9)])[None].repeat(2, 1, 1, 1)
    found = believed(torch.tensor([[0.9, 0.9], [0.1, 0.2]]), maps, taken, threshold=0.0)
    assert found.images.tolist() == [0] and found.columns.tolist() == [0]
    assert found.masks.all(), "background is swallowed: no mask logit is above 0 anywhere"
    taken[0, :2] = True  # labels take half of the image, so no class can own more than half
    assert not len(believed(torch.tensor([[0.9, 0.9], [0.1, 0.2]]), maps, taken, threshold=0.0).images)
    assert not len(believed(torch.tensor([[0.9, 0.9], [0.1, 0.2]]), maps, taken, threshold=0.5).images)
