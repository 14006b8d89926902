"""What class impressions for segmentation measure, and what they draw from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from perdure.methods.ccsi_seg import layouts, measurements, statistics
from perdure.methods.ccsi_seg.layouts import ClassAppearance
from perdure.methods.ccsi_seg.terms import moment_loss


def scene(height=40, width=48):
    rows = torch.full((2, height, width), -1)
    rows[0, 10:20, 8:28] = 0  # 10 high, 20 wide
    rows[1, 30:36, 20:26] = 1
    images = torch.zeros(2, 3, height, width)
    images[:, 0][rows == 0] = 1.0
    images[:, 1][rows == 1] = -1.0
    return images, rows


def test_regions_by_hand():
    _, rows = scene()
    rows[1, 0, 0] = 0  # a single pixel says nothing of a shape
    found = measurements.find_regions(rows, 3)
    assert found.image.tolist() == [0, 1] and found.row.tolist() == [0, 1]
    assert found.area.tolist() == [200, 36]
    torch.testing.assert_close(found.centre, torch.tensor([[15.0, 18.0], [33.0, 23.0]], dtype=torch.float64))
    # variance of a bar of length n is n² / 12
    assert found.radius.tolist() == pytest.approx([math.sqrt(500 / 12), math.sqrt(72 / 12)])
    facts = measurements.region_facts(found, 40, 48)
    assert facts[0].tolist() == pytest.approx(
        [math.log(200 / (500 / 12)), math.log(math.sqrt(500 / 12 / 1920)), 15 / 40, 18 / 48]
    )


def test_patches_are_centred_and_keep_colours():
    images, rows = scene()
    sums = measurements.region_sums(images, rows, 3, 16)
    assert sums["regions"].tolist() == [1, 1, 0]
    mask = (sums["masks"][0, 0] / sums["inside"][0, 0].clamp_min(1)).float()
    y, x = torch.meshgrid(torch.arange(16) - 7.5, torch.arange(16) - 7.5, indexing="ij")
    assert abs(float((mask * y).sum() / mask.sum())) < 0.3 and abs(float((mask * x).sum() / mask.sum())) < 0.3
    assert float((mask * x.abs()).sum()) > 1.5 * float((mask * y.abs()).sum())  # wider than high, as in the image
    assert float(sums["patches"][0, 0].max()) == pytest.approx(1.0)
    assert sums["colors"][0, :3].tolist() == pytest.approx([1, 0, 0], abs=0.2)
    assert sums["colors"][0, 3:].abs().max() < 0.35
    assert not sums["masks"][2].any()


def test_sums_do_not_depend_on_batches():
    images, rows = scene()
    whole = measurements.region_sums(images, rows, 2, 8) | measurements.background_sums(images, rows < 0, 8)
    parts = [measurements.region_sums(images[i : i + 1], rows[i : i + 1], 2, 8) for i in range(2)]
    parts = [p | measurements.background_sums(images[i : i + 1], rows[i : i + 1] < 0, 8) for i, p in enumerate(parts)]
    for name, value in whole.items():
        assert value.dtype in (torch.float64, torch.int64), name
        torch.testing.assert_close(parts[0][name] + parts[1][name], value)


def test_window_and_codes():
    torch.manual_seed(0)
    images = torch.rand(4, 2, 32, 32) * torch.tensor([2.0, 4.0]).view(1, 2, 1, 1) - 1
    sums = measurements.background_sums(images, torch.ones(4, 32, 32, dtype=torch.bool), 8)
    ends = statistics.window(sums["intensities"])
    torch.testing.assert_close(ends, torch.tensor([[-1.0, -1.0], [1.0, 3.0]]), atol=0.07, rtol=0)
    back = statistics.decode(statistics.encode(images, ends), ends)
    assert float((back - images).abs().max()) < 0.06
    assert statistics.encode(torch.full((2, 1, 1), 99.0), ends).tolist() == [[[255]], [[255]]]


def test_drawn_background_has_the_statistics_it_is_made_from():
    torch.manual_seed(1)
    tones = torch.tensor([[0.3, 0.1], [0.1, 0.2]])
    texture = torch.tensor([[0.5, -0.2], [-0.2, 0.4]])
    power = torch.linspace(1, 0.01, measurements.BANDS)
    mean = torch.stack([torch.full((8, 8), 0.5), torch.full((8, 8), -0.5)])
    images = statistics.draw_background(600, (16, 24), mean, tones, texture, power)
    assert images.shape == (600, 2, 16, 24)
    sums = measurements.background_sums(images, torch.ones(600, 16, 24, dtype=torch.bool), 8)
    centre = sums["tones"] / 600
    torch.testing.assert_close(centre.float(), torch.tensor([0.5, -0.5]), atol=0.08, rtol=0)
    spread = sums["tones2"] / 600 - centre[:, None] * centre
    torch.testing.assert_close(spread.float(), tones, atol=0.08, rtol=0)
    torch.testing.assert_close((sums["texture"] / 600).float(), texture, atol=0.05, rtol=0)
    # the bands of so small an image that hold frequencies, but for the mean, which is the tone
    held = (
        torch.bincount(
            measurements.frequency_bands((16, 24), torch.device("cpu")).flatten(), minlength=measurements.BANDS
        )
        > 0
    )
    held[0] = False
    found = sums["power"][held].float() / sums["power"][held].sum()
    torch.testing.assert_close(found, power[held] / power[held].sum(), atol=0.02, rtol=0)


def appearance(classes=3, side=16):
    masks = torch.zeros(classes, 1, side, side)
    for row in range(classes):
        masks[row, 0, 3 + row : 13 - row, 3 + row : 13 - row] = 1.0
    facts = torch.zeros(classes, measurements.FACTS, 2)
    fill = masks.flatten(1).sum(1) * (2 * measurements.REACH / side) ** 2
    facts[:, 0, 0], facts[:, 1, 0], facts[:, 2:, 0] = fill.log(), math.log(0.12), 0.5
    facts[:, 2:, 1] = 0.25
    colors = torch.zeros(classes, 6)
    colors[:, 0] = torch.arange(classes) + 1.0
    spread = torch.zeros(classes, 6, 6)
    return ClassAppearance(
        masks, colors[:, :3, None, None].expand(-1, -1, side, side), facts, torch.zeros(3, 3), colors, spread
    )


def test_layouts_have_the_wanted_classes_places_and_sizes():
    torch.manual_seed(2)
    known = appearance()
    wanted = torch.arange(60) % 3
    drawn = layouts.plan(known, wanted, 4, (64, 64))
    assert torch.equal(drawn.rows[:, 0], wanted) and (drawn.rows[:, 1:] == -1).all()
    images, rows = layouts.paint(known, drawn, torch.zeros(60, 3, 64, 64), 0.05, recolor=False)
    for row in range(3):
        mine = rows[wanted == row]
        assert (((mine == row) | (mine == -1)).all()) and (mine == row).flatten(1).any(1).all()
        target = float(known.facts[row, 0, 0].exp()) * (0.12 * 64) ** 2
        areas = (mine == row).flatten(1).sum(1).float()
        assert 0.6 * target < float(areas.median()) < 1.3 * target
        inner = images[wanted == row][:, 0][mine == row]
        assert float(inner.median()) == pytest.approx(row + 1.0)


def test_co_occurrence_follows_the_counts():
    torch.manual_seed(3)
    known = appearance()
    chance = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    drawn = layouts.plan(known._replace(chance=chance), torch.arange(600) % 3, 3, (64, 64))
    present = torch.stack([(drawn.rows == row).any(1) for row in range(3)], 1).float().view(200, 3, 3).mean(0)
    assert present[0, 1] == 1.0 and abs(present[0, 2] - 0.5) < 0.1
    assert torch.equal(present[1], torch.tensor([0.0, 1.0, 0.0]))
    assert torch.equal(present[2], torch.ones(3))
    assert (drawn.rows >= 0).sum(1).max() == 3
    alone = layouts.plan(known._replace(chance=chance), torch.arange(6) % 3, 1, (64, 64))
    assert alone.rows.shape == (6, 1)


def test_recolouring_follows_the_covariance_with_the_surroundings():
    torch.manual_seed(4)
    known = appearance()
    spread = torch.zeros(3, 6, 6)
    eye = torch.eye(3)
    spread[:, :3, :3], spread[:, 3:, 3:] = eye, eye
    spread[:, :3, 3:], spread[:, 3:, :3] = -eye, -eye  # always the opposite of the background
    known = known._replace(colors=torch.zeros(3, 6), patches=torch.zeros(3, 3, 16, 16), color_spread=spread)
    drawn = layouts.plan(known, torch.zeros(8, dtype=torch.int64), 1, (64, 64))
    images, rows = layouts.paint(known, drawn, torch.full((8, 3, 64, 64), 0.7), 0.0, recolor=True)
    inner = images.movedim(1, -1)[rows == 0]
    assert float(inner.median()) == pytest.approx(-0.7, abs=0.15)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True)])
def test_moments_under_masks(norm):
    torch.manual_seed(5)
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 6, 2, 2), norm(6))
    images = torch.randn(3, 3, 8, 8)
    with measurements.recorded_maps(body) as maps, torch.no_grad():
        body(images)
    assert [tuple(m.shape) for m in maps] == [(3, 4, 8, 8), (3, 6, 4, 4)]
    assert not body[0]._forward_hooks
    mask = torch.zeros(3, 1, 8, 8)
    mask[:, :, 2:4, 2:6] = 1
    sums = measurements.moment_sums(maps, torch.cat([torch.ones_like(mask), mask], 1).double())
    layers = measurements.layer_of(maps)
    assert layers.tolist() == [0] * 4 + [1] * 6
    found = sums.moments(layers)
    whole = torch.cat([m.double().movedim(1, 0).flatten(1) for m in maps[:1]])
    torch.testing.assert_close(found[0, 0, :4], whole.mean(1))
    torch.testing.assert_close(found[1, 0, :4], whole.var(1, correction=0))
    inside = maps[1][:, :, 1, 1:3].double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(found[0, 1, 4:], inside.mean(1))
    torch.testing.assert_close(found[1, 1, 4:], inside.var(1, correction=0))


def test_sums_by_label_do_not_depend_on_how_many_masks_fit(monkeypatch):
    torch.manual_seed(6)
    maps = [torch.randn(5, 4, 8, 8), torch.randn(5, 2, 1, 1)]
    rows, counts = torch.randint(-1, 3, (5, 8, 8)), torch.rand(5, 8, 8) > 0.2
    whole = measurements.label_sums(maps, rows, counts, 3)
    monkeypatch.setattr(measurements, "MASK_PIXELS", 600)
    for one, other in zip(whole, measurements.label_sums(maps, rows, counts, 3), strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other)
    second = maps[0].double().movedim(1, -1)
    torch.testing.assert_close(whole.values[2, :4], second[rows == 1].sum(0))
    torch.testing.assert_close(whole.squares[0, :4], second[counts].square().sum(0))
    torch.testing.assert_close(whole.weight[3], (rows == 2).double().sum() / torch.tensor([1.0, 64.0]).double())


def test_moment_loss_is_relative():
    layers = torch.tensor([0, 1, 1])
    bank = torch.tensor([[[1.0, 100.0, 0.0]], [[4.0, 1e4, 1.0]]])
    now = bank.clone()
    assert float(moment_loss(now, bank, layers, 10.0)) < 1e-3
    now[0, 0, 0] += 2.0  # one deviation in the first layer
    assert float(moment_loss(now, bank, layers, 10.0)) == pytest.approx(10 / 11, abs=1e-3)
    now = bank.clone()
    now[1, 0, 1] *= 2  # twice the variance in one of two channels of the second
    assert float(moment_loss(now, bank, layers, 10.0)) == pytest.approx(math.sqrt(1 / 2) / 11, abs=1e-3)
