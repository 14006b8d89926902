from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.engine.state import restore
from perdure.errors import PerdureError, UsageError
from perdure.networks.classifier import Classifier, CosineHead
from perdure.networks.continual_norm import ContinualNorm

ROWS = torch.tensor([[1.0, 0.0, 0.0], [3.0, 4.0, 0.0]])
FEATURES = torch.tensor([[0.0, 2.0, 0.0], [1.0, 1.0, 1.0]])


def make(classes: tuple[int, ...] = (3, 2), **settings: object) -> Classifier:
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), ContinualNorm(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    network = Classifier(body, 8, in_channels=3, **settings)
    for number in classes:
        network.grow(number)
    return network


def image(n: int = 4, side: int = 8) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(n, 3, side, side)


def head(*parts: Tensor, scale: float = 1.0) -> CosineHead:
    made = CosineHead(parts[0].shape[1])
    for rows in parts:
        made.grow(len(rows))
        made.rows[-1].data.copy_(rows)
    made.scale.data.fill_(scale)
    return made


@pytest.mark.golden
def test_the_published_example_of_the_head() -> None:
    wanted = torch.tensor([[0.0, 1.6], [1.1547, 1.6166]])
    single, split = head(ROWS, scale=2.0), head(ROWS[:1], ROWS[1:], scale=2.0)
    torch.testing.assert_close(single(FEATURES), wanted, rtol=0, atol=5e-5)
    assert torch.equal(split(FEATURES), single(FEATURES))
    assert torch.equal(2 * split.cosines(FEATURES), split(FEATURES))


def test_the_split_head_learns_as_the_single_one_does() -> None:
    single, split = head(ROWS, scale=2.0), head(ROWS[:1], ROWS[1:], scale=2.0)
    for one in (single, split):
        F.cross_entropy(one(FEATURES), torch.tensor([0, 1])).backward()
    assert torch.equal(torch.cat([rows.grad for rows in split.rows]), single.rows[0].grad)
    assert torch.equal(split.scale.grad, single.scale.grad)
    assert single.scale.grad.abs() > 0


def test_a_new_head_has_scale_one_and_a_floor_under_its_loss() -> None:
    made = CosineHead(256)
    assert made.scale.shape == ()
    assert made.scale.item() == 1.0
    assert made.scale.requires_grad
    opposite = head(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    loss = F.cross_entropy(opposite(torch.tensor([[5.0, 0.0]])), torch.tensor([0]))
    assert loss.item() == pytest.approx(0.127, abs=1e-3)


def test_rows_are_uniform_and_a_function_of_the_seed() -> None:
    torch.manual_seed(0)
    made = CosineHead(256)
    made.grow(400)
    assert made.rows[0].abs().max().item() == pytest.approx(1 / 16, rel=1e-3)
    assert made.rows[0].std().item() == pytest.approx(1 / 16 / 3**0.5, rel=0.01)
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), make().parameters(), strict=True))
    double = make().double()
    double.grow(1)
    assert double.head.rows[-1].dtype == torch.float64
    with pytest.raises(ValueError, match="at least one class"):
        made.grow(0)


def test_features_of_length_zero_and_in_half_precision() -> None:
    made = head(ROWS, scale=2.0)
    assert made(torch.zeros(1, 3)).tolist() == [[0.0, 0.0]]
    with torch.autocast("cpu", torch.bfloat16):
        scores = made(FEATURES)
    assert torch.equal(scores, made(FEATURES)), "cosines do not lose precision"
    assert made(FEATURES.bfloat16()).dtype == torch.float32


def test_logits_are_scaled_cosines_in_task_order() -> None:
    network = make((3, 2, 4)).eval()
    network.head.scale.data.fill_(3.0)
    logits, features = network(image())
    assert features.shape == (4, 8)
    assert logits.shape == (4, 9)
    by_hand = F.cosine_similarity(features[:, None], torch.cat(list(network.head.rows))[None], dim=2)
    torch.testing.assert_close(network.cosines(features), by_hand)
    assert torch.equal(network.features(image()), features)
    assert torch.equal(logits, 3 * network.cosines(features))
    torch.testing.assert_close(network.classify(features, 1), logits[:, 3:])
    torch.testing.assert_close(network.cosines(features, -1), logits[:, 5:] / 3)
    assert network.classify(features, 3).shape == network.cosines(features, 3).shape == (4, 0)


def test_growing_leaves_old_rows_scale_and_logits_alone() -> None:
    network = make().eval()
    network.head.scale.data.fill_(5.0)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    old = network(image())[0]
    network.grow(7)
    assert all(torch.equal(before[name], network.state_dict()[name]) for name in before)
    assert set(network.state_dict()) - set(before) == {"head.rows.2"}
    torch.testing.assert_close(network(image())[0][:, :5], old)


def test_imprinting_points_new_rows_where_the_features_are() -> None:
    network = make((2,))
    network.head.rows[0].data.copy_(torch.eye(8)[:2] * torch.tensor([[2.0], [4.0]]))
    network.grow(1)
    network.grow(2)
    network.head.rows[1].data.copy_(torch.eye(8)[2:3] * 9)
    old = [rows.clone() for rows in list(network.head.rows)[:-1]]
    directions = torch.zeros(2, 8)
    directions[0, 5], directions[1, 6], directions[1, 7] = 0.25, 3.0, 4.0
    newest = network.head.rows[-1]
    network.imprint(directions)
    assert network.head.rows[-1] is newest
    assert newest.requires_grad
    assert newest[0].tolist() == [0, 0, 0, 0, 0, 5.0, 0, 0], "mean length of old rows: (2 + 4 + 9) / 3"
    assert newest[1].tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 3.0, 4.0])
    assert all(torch.equal(a, b) for a, b in zip(old, list(network.head.rows)[:-1], strict=True))
    assert network.cosines(directions, -1).diagonal().tolist() == pytest.approx([1.0, 1.0])


def test_imprinting_the_first_task_keeps_the_length_of_its_rows() -> None:
    network = make((3,))
    length = network.head.rows[0].norm(dim=1).mean().item()
    network.imprint(torch.eye(8)[:3].double())
    assert network.head.rows[0].norm(dim=1).tolist() == pytest.approx([length] * 3)
    assert network.head.rows[0].dtype == torch.float32


def test_directions_that_cannot_be_imprinted() -> None:
    with pytest.raises(ValueError, match="grow the head"):
        make(()).imprint(torch.ones(1, 8))
    network = make()
    with pytest.raises(ValueError, match="do not fit"):
        network.imprint(torch.ones(3, 8))
    before = network.head.rows[-1].clone()
    for bad in (0.0, float("nan")):
        directions = torch.ones(2, 8)
        directions[1] = bad
        with pytest.raises(PerdureError, match="class 2 of the task's 2") as caught:
            network.imprint(directions)
        assert caught.value.hint
    assert torch.equal(network.head.rows[-1], before)


def test_groups_hold_every_trainable_parameter_once() -> None:
    network = make((3, 2, 4))
    groups = network.parameter_groups()
    assert list(groups) == ["backbone", "neck", "old_classifiers", "new_classifier", "scale"]
    ids = [id(p) for part in groups.values() for p in part]
    assert sorted(ids) == sorted(id(p) for p in network.parameters())
    assert groups["neck"] == []
    assert [len(p) for p in groups["old_classifiers"]] == [3, 2]
    assert groups["new_classifier"][0] is network.head.rows[2]
    assert groups["scale"][0] is network.head.scale
    network.freeze_old_classifiers()
    network.freeze_norm()
    groups = network.parameter_groups()
    assert groups["old_classifiers"] == []
    assert len(groups["backbone"]) == 2
    assert len(groups["new_classifier"]) == len(groups["scale"]) == 1
    assert make(()).parameter_groups()["new_classifier"] == []


def test_frozen_old_rows_stay_while_the_rest_learns() -> None:
    network = make()
    network(image())[0].sum().backward()
    network.freeze_old_classifiers()
    assert network.head.rows[0].grad is None
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.SGD([p for g in network.parameter_groups().values() for p in g], lr=0.1, weight_decay=0.1)
    optimizer.zero_grad()
    F.cross_entropy(network(image())[0], torch.tensor([0, 1, 3, 4])).backward()
    optimizer.step()
    after = dict(network.named_parameters())
    assert torch.equal(before["head.rows.0"], after["head.rows.0"])
    for name in ("head.rows.1", "head.scale", "body.0.weight", "body.1.batch.weight"):
        assert not torch.equal(before[name], after[name]), name


def test_frozen_normalisation_survives_train_mode() -> None:
    network = make()
    network.freeze_norm()
    network.train()
    norm, dropout = network.body[1], network.body[3]
    assert network.training
    assert network.body[0].training
    assert not norm.batch.training
    assert dropout.training, "normalisation does not decide dropout"
    network.freeze_dropout()
    assert not dropout.training
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    first = network(image())[0]
    assert torch.equal(first, network(image())[0]), "dropout is off"
    assert all(torch.equal(before[name], buffer) for name, buffer in network.named_buffers())
    outer = nn.ModuleDict({"network": copy.deepcopy(network)}).eval().train()
    assert not outer["network"].body[1].batch.training
    assert make().train().body[1].batch.training


def test_a_copy_shares_nothing() -> None:
    network = make()
    network(image())[0].sum().backward()
    teacher = copy.deepcopy(network).eval().requires_grad_(False)
    network.grow(2)
    twin = copy.deepcopy(network)
    for copied in (teacher, twin):
        storages = {t.data_ptr() for t in copied.state_dict().values()}
        assert not storages & {t.data_ptr() for t in network.state_dict().values()}
    before = teacher(image())[0]
    with torch.no_grad():
        network.head.scale.fill_(9.0)
        network.head.rows[0].zero_()
    assert teacher.head.scale.item() == 1.0
    assert torch.equal(teacher(image())[0], before)
    assert network.head.scale.requires_grad
    assert len(teacher.head.rows) == 2


def test_it_comes_back_from_a_checkpoint() -> None:
    network = make()
    network.head.scale.data.fill_(4.0)
    network(image())
    fresh = make()
    restore(fresh, network.state_dict())
    assert torch.equal(fresh.eval()(image())[0], network.eval()(image())[0])
    assert fresh.head.scale.item() == 4.0


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 3, 8, 8, 8), "2D images"),
        ((3, 8, 8), "2D images"),
        ((2, 1, 8, 8), "3 channels, not 1"),
        ((2, 3, 8, 9), "square images of 7 to 10 pixels a side, not 8×9"),
        ((2, 3, 11, 11), "of 7 to 10 pixels a side, not 11×11\n.*side=11"),
    ],
)
def test_inputs_that_do_not_fit_are_plain_errors(shape: tuple[int, ...], words: str) -> None:
    network = make(sides=range(7, 11))
    with pytest.raises(UsageError, match=words) as caught:
        network(torch.zeros(shape))
    assert caught.value.hint
    assert "\n" not in caught.value.what
    with pytest.raises(UsageError, match="3 axes"):
        network.check_size((8, 8, 8))
    network.check_size((8, 8))


def test_a_body_without_sides_takes_any_image() -> None:
    network = make()
    network.check_size((5, 9))
    assert network.eval()(torch.rand(1, 3, 5, 9))[1].shape == (1, 8)
    assert network.weights.source == "random"
    assert network.least_batch == 1
