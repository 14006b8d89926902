"""Class queries, decoder and presence head."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perdure.errors import UsageError
from perdure.networks.build import build_network
from perdure.networks.clip.decoder import AttentionDecoder, PresenceHead, presence
from perdure.networks.clip.segmenter import ClipSegmenter
from perdure.networks.layers import NORMS


def narrow(**options: object) -> ClipSegmenter:
    torch.manual_seed(2)
    sizes = {"patch": 8, "width": 48, "depth": 3, "heads": 4, "dim": 32, "feature_blocks": (0, 1, 2)}
    network = build_network("clip_segmenter", 2, 3, **({"encoder": sizes, "input_size": 32} | options))
    assert isinstance(network, ClipSegmenter)
    return network


def table(rows: int, dim: int = 32) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(4)), dim=1)


def test_permuted_text_rows_permute_all_outputs() -> None:
    network = narrow().eval()
    images, text, order = torch.randn(2, 3, 32, 48), table(5), [3, 0, 4, 1, 2]
    straight, permuted = network(images, text), network(images, text[order])
    torch.testing.assert_close(permuted.presence, straight.presence[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.decoded.q0, straight.decoded.q0[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(permuted.decoded.queries, straight.decoded.queries[:, :, order], rtol=1e-4, atol=1e-5)
    for one, other in zip(permuted.decoded.masks, straight.decoded.masks, strict=True):
        assert one.shape == (2, 5, 4, 6)
        torch.testing.assert_close(one, other[:, order], rtol=1e-4, atol=1e-5)


def test_more_classes_act_through_self_attention_alone() -> None:
    network = narrow().eval()
    images, text = torch.randn(1, 3, 32, 32), table(6)
    assert (network(images, text).presence[:, :4] - network(images, text[:4]).presence).abs().max() > 1e-6
    for stage in network.decoder.stages:
        for layer in stage.layers:
            torch.nn.init.zeros_(layer.self_attention.out_proj.weight)
    few, many = network(images, text[:4]), network(images, text)
    torch.testing.assert_close(many.presence[:, :4], few.presence)
    torch.testing.assert_close(many.decoded.masks[-1][:, :4], few.decoded.masks[-1])


def test_scores_are_the_mean_over_heads_of_the_last_layer_and_add_up_over_stages() -> None:
    network = narrow().eval()
    scores: dict[int, torch.Tensor] = {}
    for number, stage in enumerate(network.decoder.stages):
        keep = lambda _, __, out, number=number: scores.__setitem__(number, out[1])  # noqa: E731
        stage.layers[-1].cross_attention.register_forward_hook(keep)
    out = network(torch.randn(1, 3, 32, 32), table(3))
    means = [scores[number].mean(1).reshape(1, 3, 4, 4) for number in range(3)]
    torch.testing.assert_close(out.decoded.masks[0], means[0])
    torch.testing.assert_close(out.decoded.masks[2], means[0] + means[1] + means[2])


def test_the_deepest_map_is_read_first() -> None:
    decoder = AttentionDecoder([8, 16, 24], 32)
    assert [stage.project.in_features for stage in decoder.stages] == [24, 16, 8]


def test_a_layer_is_torchs_own_cross_attention() -> None:
    """The same numbers as nn.MultiheadAttention, whose scores cannot be had."""
    torch.manual_seed(5)
    attention = AttentionDecoder([8], 32, heads=4).stages[0].layers[0].cross_attention.eval()
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    parts = (attention.query, attention.key, attention.value)
    theirs.in_proj_weight.data = torch.cat([part.weight for part in parts])
    theirs.out_proj.load_state_dict(attention.out.state_dict())
    queries, memory = torch.randn(2, 3, 32), torch.randn(2, 7, 32)
    found, scores = attention(queries, memory)
    expected, weights = theirs(queries, memory, memory, average_attn_weights=False)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(scores.softmax(-1), weights)


def test_initial_weights_are_the_published_ones() -> None:
    decoder = AttentionDecoder([48] * 3, 128, layers=3)
    for stage in decoder.stages:
        packed = [layer.self_attention.in_proj_weight for layer in stage.layers]
        assert torch.equal(packed[0], packed[1])
        assert torch.equal(packed[0], packed[2])
        assert packed[0].abs().max() <= (6 / (4 * 128)) ** 0.5
        assert packed[0].std() > 0.05  # Xavier; the other layers have 0.02 at length 512
        for part in stage.modules():
            if isinstance(part, torch.nn.Linear):
                assert part.weight.std().item() == pytest.approx(0.04, rel=0.15)
                assert not part.bias.any()
    assert not torch.equal(*(stage.layers[0].self_attention.in_proj_weight for stage in list(decoder.stages)[:2]))


def test_presence_is_a_probability_of_the_first_logit() -> None:
    head = PresenceHead(4)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {"project.weight": (2, 12)}
    query, q0, cls, text = torch.ones(1, 1, 4), torch.full((1, 1, 4), 0.5), torch.ones(1, 4), torch.full((1, 4), 3.0)
    head.project.weight.data = torch.tensor([[1.0] * 4 + [0.0] * 8, [0.0] * 8 + [1.0] * 4])
    assert head(query, q0, cls, text).tolist() == [[[2.0, 12.0]]]
    assert presence(torch.tensor([[[3.0, 3.0], [9.0, -9.0]]])).tolist() == [[0.5, pytest.approx(1.0)]]


def test_every_parameter_gets_a_gradient() -> None:
    network = narrow()
    out = network(torch.randn(2, 3, 32, 32), table(4))
    total = out.presence.sum() + sum((mask**2).sum() for mask in out.decoded.masks)
    (total + (out.encoded.dense[:, 0].sum() + out.encoded.cls[:, 0].sum())).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("options", [{}, {"encoder": "resnet18", "dim": 32}])
def test_parameter_groups_hold_every_parameter_once(options: dict[str, object]) -> None:
    network = narrow(**options)
    groups = network.parameter_groups()
    assert list(groups) == ["encoder", "encoder_norm", "decoder", "decoder_norm"]
    grouped = [p for group in groups.values() for p in group]
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(network.parameters()))
    norms = {id(p) for part in network.modules() if isinstance(part, NORMS) for p in part.parameters()}
    assert {id(p) for p in groups["encoder_norm"] + groups["decoder_norm"]} == norms
    encoder = {id(p) for p in network.encoder.parameters()}
    in_decoder = [p for p in groups["decoder"] if id(p) in encoder]
    assert len(in_decoder) == (1 if options else 0)  # the projection, which no weights of a backbone bring


@pytest.mark.parametrize(("train", "blocks"), [("decoder", []), ("last-1", [2]), ("last-3", [0, 1, 2])])
def test_frozen_parts_of_the_encoder_do_not_train(train: str, blocks: list[int]) -> None:
    network = narrow(train=train)
    trained = [name for name, p in network.encoder.named_parameters() if p.requires_grad]
    layers = {int(name.split(".layers.")[1].split(".")[0]) for name in trained if ".layers." in name}
    assert sorted(layers) == blocks
    assert ("visual_projection.weight" in trained) == bool(blocks)
    assert "vision_model.embeddings.class_embedding" not in trained
    assert all(p.requires_grad for p in network.decoder.parameters())


def test_batch_statistics_of_frozen_parts_stay() -> None:
    network = narrow(encoder="resnet18", train="decoder").train()
    before = {name: tensor.clone() for name, tensor in network.encoder.state_dict().items()}
    network(torch.randn(2, 3, 64, 64), table(2, 128))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.encoder.state_dict().items())
    assert network.encoder.project.weight.requires_grad


@pytest.mark.parametrize("train", ["last-0", "last-4", "last-", "none", "last--1"])
def test_other_words_for_what_trains_are_refused(train: str) -> None:
    with pytest.raises(UsageError, match=r"give all, decoder, or last-1 to last-3"):
        narrow(train=train)


def test_frozen_dropout_covers_the_attention_weights() -> None:
    network = narrow(dropout=0.9).train()
    images, text = torch.randn(1, 3, 32, 32), table(4)
    assert not torch.equal(network(images, text).presence, network(images, text).presence)
    network.freeze_dropout()
    network.train()
    assert torch.equal(network(images, text).presence, network(images, text).presence)


def test_text_rows_and_images_that_do_not_fit_are_refused() -> None:
    network = narrow()
    with pytest.raises(UsageError, match=r"text rows of length 32, not a table of shape \(2, 16\)"):
        network(torch.zeros(1, 3, 32, 32), torch.zeros(2, 16))
    with pytest.raises(UsageError, match="both sides must be multiples of 8"):
        network(torch.zeros(1, 3, 30, 32), table(2))
    with pytest.raises(UsageError, match="9 heads cannot be built on vectors of length 32"):
        narrow(heads=9)
    with pytest.raises(UsageError, match="joint space has length 32"):
        narrow(dim=64)
