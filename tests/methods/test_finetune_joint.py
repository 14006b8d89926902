"""The lower and the upper bound."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from perdure.methods.finetune import Finetune
from perdure.methods.joint import Joint
from perdure.networks.segmenter import upsample

GROUPS = [(2, 3), (1,)]


@pytest.mark.contract
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", ["seen", "new"])
def test_finetune(make_blocks, make_setup, learn, dims, channels):
    stream = make_blocks(GROUPS, dims, count=4)
    method = Finetune(make_setup(Finetune.Options(channels=channels), dims))
    learn(method, stream, 0)
    before = method.network.classifiers[0].weight.detach().clone()
    log = learn(method, stream, 1)
    assert all(math.isfinite(terms["current"]) for terms in log["train"])
    assert torch.equal(method.network.classifiers[0].weight, before) == (channels == "new")
    assert not method.kept()
    predicted = method.eval().predict(torch.randn(1, 3, *[16] * dims))
    assert predicted.scores().shape == (1, 4, *[16] * dims) and predicted.class_ids == (0, 2, 3, 1)


def test_loss_is_the_sum_over_seen_classes(make_blocks, make_setup, learn, first_batch):
    stream, method = make_blocks(GROUPS), Finetune(make_setup(Finetune.Options()))
    learn(method, stream, 0)
    task = stream.tasks[1]
    with stream.opened(task):
        method.begin(task)
        batch = first_batch(method.phases(task)[0].data())
    logits = upsample(method.network(batch.images)[0], (16, 16))
    weight = torch.tensor(4.0)
    expected = sum(
        F.binary_cross_entropy_with_logits(logits[:, k], (batch.labels == c).float(), pos_weight=weight)
        for k, c in enumerate((2, 3, 1))
    )
    torch.testing.assert_close(method.loss(batch)["current"], expected)


def test_joint_learns_all_classes_at_once(make_blocks, make_setup, learn):
    stream = make_blocks([(2, 3, 1)], count=4)
    method = Joint(make_setup(Joint.Options(), epochs=8, lr=0.02))
    log = learn(method, stream, 0)["train"]
    assert Joint.sees_all_tasks and not Finetune.sees_all_tasks
    assert log[-1]["current"] < 0.7 * log[0]["current"]
    assert method.eval().predict(torch.randn(1, 3, 8, 8)).class_ids == (0, 2, 3, 1)


def test_prediction_is_background_unless_a_class_exceeds_one_half(make_setup, make_blocks):
    method = Joint(make_setup(Joint.Options()))
    method.begin(make_blocks([(2, 3, 1)]).tasks[0])
    classifier = method.network.classifiers[0]
    with torch.no_grad():
        classifier.weight.zero_()
        classifier.bias.copy_(torch.tensor([0.0, -1.0, -2.0]))
    images = torch.randn(1, 3, 8, 8)
    assert not method.predict(images).labels().any()
    with torch.no_grad():
        classifier.bias[1] = 0.1
    assert (method.predict(images).labels() == 3).all()
