"""Learning without Forgetting term by term, and independent models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from perdure.kept.ledger import task_folder, write_ledger
from perdure.kept.method_state import write_kept
from perdure.labels import IGNORE
from perdure.methods import training
from perdure.methods.distillation import sigmoid_distillation, softmax_distillation, unbiased_distillation
from perdure.methods.independent import Independent
from perdure.methods.lwf import Lwf, marginal_cross_entropy

GROUPS = [(2, 3), (1,)]


@pytest.fixture
def maps(wave):
    """Logits of four classes, of two old ones, and labels; two images of three axes."""
    labels = torch.zeros(2, 2, 3, 2, dtype=torch.int64)
    labels[0, 0] = 7
    labels[1, 1, 2] = 9
    labels[1, 0, 0, 0] = IGNORE
    return wave((2, 4, 2, 3, 2), 0.7), wave((2, 2, 2, 3, 2), 1.3, 0.4), labels


def test_sigmoid_distillation_by_hand(maps):
    logits, old, labels = maps
    open_ = torch.tensor([[True, False], [True, True]])
    expected = 0.0
    for k in range(2):
        images = []
        for n in range(2):
            if open_[n, k]:
                target = torch.where(labels[n] == 7, 0.0, old[n, k].sigmoid())
                images.append(F.binary_cross_entropy(logits[n, k].sigmoid(), target))
        expected += sum(images) / len(images)
    found = sigmoid_distillation(logits[:, :2], old, labels != 7, open_)
    torch.testing.assert_close(found, expected)
    assert sigmoid_distillation(logits[:, :2], old, labels != 7, open_ & False) == 0


def test_unbiased_distillation_by_hand(maps):
    logits, old, labels = maps
    open_, temperature = torch.tensor([[True, False], [True, True]]), 2.0
    zero = torch.zeros(2, 1, 2, 3, 2)
    student, teacher = ((torch.cat([zero, z], 1) / temperature).softmax(1) for z in (logits, old))
    total, number = 0.0, 0
    for n, *place in (labels == 0).nonzero().tolist():
        s, t = student[(n, slice(None), *place)], teacher[(n, slice(None), *place)]
        alone = [1 + k for k in range(2) if open_[n, k]]
        rest_s, rest_t = 1 - s[alone].sum(), 1 - t[alone].sum()
        total -= rest_t * rest_s.log() + (t[alone] * s[alone].log()).sum()
        number += 1
    full = [torch.cat([zero, z], 1) for z in (logits, old)]
    found = unbiased_distillation(*full, labels == 0, open_, temperature)
    torch.testing.assert_close(found, temperature**2 * total / number)
    assert unbiased_distillation(*full, labels < 0, open_, temperature) == 0


def test_marginal_cross_entropy_by_hand(maps):
    logits, _, labels = maps
    told = torch.tensor([[True, False, True, True], [True, True, True, True]])
    full = torch.cat([torch.zeros(2, 1, 2, 3, 2), logits], 1)
    p, ids = full.softmax(1), (9, 4, 7, 5)
    total, number = 0.0, 0
    for n, *place in (labels != IGNORE).nonzero().tolist():
        here, label = p[(n, slice(None), *place)], int(labels[(n, *place)])
        if label:
            total -= 4 * here[1 + ids.index(label)].log()
        else:
            total -= (here[0] + here[1:][~told[n]].sum()).log()
        number += 1
    torch.testing.assert_close(marginal_cross_entropy(full, labels, ids, told, 4.0), total / number)


def test_softmax_distillation_by_hand(wave):
    logits, old = wave((3, 4), 0.9), wave((3, 4), 2.1)
    wanted, found = (old / 2).softmax(1), (logits / 2).softmax(1)
    torch.testing.assert_close(softmax_distillation(logits, old, 2.0), -4 * (wanted * found.log()).sum(1).mean())
    assert softmax_distillation(logits[:, :1], old[:, :1], 2.0) == 0


@pytest.mark.contract
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_lwf_of_two_tasks(make_blocks, make_setup, learn, first_batch, dims, form):
    stream, method = make_blocks(GROUPS, dims, count=4), Lwf(make_setup(Lwf.Options(form=form, distill=3), dims))
    assert set(learn(method, stream, 0)["train"][0]) == {"current"}
    log = learn(method, stream, 1)["train"]
    assert set(log[0]) == {"current", "distill"}
    assert all(math.isfinite(value) for terms in log for value in terms.values())
    assert not method.kept() and not any("old" in name for name in method.state_dict())
    assert method.learning == (1,)
    task = stream.tasks[1]
    with stream.opened(task):
        batch = first_batch(method.phases(task)[0].data())
    method.network.load_state_dict({**method.network.state_dict(), **method.old_network.module.state_dict()})
    with torch.no_grad():  # nothing moved: the gradient of agreeing is zero, apart from what the labels know better
        method.eval()
        near = method.loss(batch)["distill"]
        method.network.classifiers[0].weight.mul_(3)
        assert method.loss(batch)["distill"] > near
    images = torch.randn(1, 3, *[16] * dims)
    assert method.predict(images).class_ids == (0, 2, 3, 1)


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_where_nothing_is_new_the_old_network_is_asked_about_all(make_blocks, make_setup, learn, first_batch, form):
    stream, method = make_blocks([(1, 2), (1, 2)], count=4), Lwf(make_setup(Lwf.Options(form=form)))
    learn(method, stream, 0)
    with stream.opened(stream.tasks[1]):
        method.begin(stream.tasks[1])
        batch = first_batch(method.phases(stream.tasks[1])[0].data())
    assert batch.labels.max() > 0  # classes are labelled, and yet:
    with torch.no_grad():
        method.eval()
        near = method.loss(batch)["distill"]
        for classifier in method.network.classifiers:
            classifier.weight.mul_(3)
        far = method.loss(batch)["distill"]
    assert 0 < near < far


@pytest.mark.contract
def test_each_independent_model_is_trained_alone(make_blocks, make_setup, learn):
    stream, training_options = make_blocks(GROUPS, count=4), {"epochs": 3, "later_epochs": 1, "lr": 0.02}
    method = Independent(make_setup(Independent.Options(), **training_options))
    learn(method, stream, 0)
    before = copy.deepcopy(method.networks[0].state_dict())
    log = learn(method, stream, 1)["train"]
    per_epoch = 2
    assert len(log) == 3 * per_epoch, "as long as a first task"
    assert all(torch.equal(v, before[k]) for k, v in method.networks[0].state_dict().items())
    assert method.learned == ((2, 3), (1,))
    task = stream.tasks[1]
    optimizer = next(iter(method.phases(task))).optimizer()
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 0.2}  # not a tenth, as at later tasks


def test_predictions_of_models_are_merged_group_by_group(make_blocks, make_setup, learn):
    stream = make_blocks(GROUPS, count=2)
    method = Independent(make_setup(Independent.Options(), epochs=1))
    for index in range(2):
        learn(method, stream, index)
    method.learned = ((2, 3), (1, 3))  # as if the second set labelled class 3 again
    method.networks[1] = copy.deepcopy(method.networks[0])
    with torch.no_grad():
        method.networks[1].classifiers[0].bias.add_(0.5)
    images = torch.randn(2, 3, 16, 16)
    prediction = method.eval().predict(images)
    first, second = (
        training.scores(n, images, ids).scores() for n, ids in zip(method.networks, method.learned, strict=True)
    )
    expected = torch.stack([first[:, 0], first[:, 1], torch.maximum(first[:, 2], second[:, 2]), second[:, 1]], 1)
    assert prediction.class_ids == (0, 2, 3, 1) and prediction.groups == (3, 1)
    torch.testing.assert_close(prediction.scores(), expected)
    asked = []
    for number, network in enumerate(method.networks):
        network.features = (lambda n, f: lambda images: asked.append(n) or f(images))(number, network.features)
    by_group = [prediction.score(channels) for channels in prediction.chunks(2)]
    torch.testing.assert_close(torch.cat(by_group, 1), expected)
    assert prediction.chunks(2) == [(0, 1), (2, 3)]
    assert asked == [0, 0, 1], "each group asks only the models that know its classes"


def test_weights_of_earlier_models_are_written_once(make_blocks, make_setup, learn, tmp_path):
    stream, sealed = make_blocks(GROUPS, count=2), []
    method = Independent(make_setup(Independent.Options(), epochs=1))
    for task in stream.tasks:
        learn(method, stream, task.index)
        sealed.append(task_folder(tmp_path, task.index, task.name))
        before = sealed[-2] if task.index else None
        (weights,) = write_kept(sealed[-1], method.state_dict(), method.kept(), len(task.seen), before=before)
        write_ledger(sealed[-1], task.name, [weights], patients=False)
    places = {t["name"]: t["file"] for t in weights["tensors"]}
    assert all(("tasks/00" in place) == name.startswith("networks.0.") for name, place in places.items())
    assert weights["bytes"] == sum(t.nbytes for t in method.state_dict().values())
