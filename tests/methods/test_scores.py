"""What methods without a head of their own predict."""

from __future__ import annotations

import torch
from torch import nn

from perdure.methods.training import scores
from perdure.networks.classifier import Classifier
from perdure.networks.segmenter import Segmenter


def test_scores_come_in_the_order_in_which_channels_are_asked_for() -> None:
    torch.manual_seed(0)
    network = Segmenter(nn.Conv2d(3, 8, 4, 4), 8, 4, 2)
    network.grow(2)
    network.grow(1)
    images = torch.randn(2, 3, 9, 10)  # no multiple of the stride
    predicted = scores(network, images, (5, 2, 7))
    whole = predicted.scores()
    assert predicted.class_ids == (0, 5, 2, 7)
    assert whole.shape == (2, 4, 9, 10)
    assert (whole[:, 0] == 0.5).all()
    assert torch.equal(whole[:, 1:], network.full_logits(images).sigmoid())
    for channels in ([0], [3], [2, 1], [3, 0, 1], [3, 2, 1, 0], [2, 3, 1]):
        torch.testing.assert_close(predicted.score(channels), whole[:, channels], rtol=0, atol=1e-6)


def test_whole_images_get_the_softmax() -> None:
    torch.manual_seed(0)
    network = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), 12)
    network.grow(3)
    predicted = scores(network, torch.rand(4, 3, 8, 8), (3, 1, 2))
    assert predicted.class_ids == (3, 1, 2)
    torch.testing.assert_close(predicted.scores().sum(1), torch.ones(4))
    torch.testing.assert_close(predicted.score([2, 0]), predicted.scores()[:, [2, 0]], rtol=0, atol=0)
