"""The image encoders: sizes, equality with transformers' own forward pass, any sides."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from perdure.errors import UsageError
from perdure.networks.build import build_network
from perdure.networks.clip.encoder import NARROW, VIT_B16, ClipEncoder, VitShape, resize_positions
from perdure.networks.clip.segmenter import ClipSegmenter
from perdure.networks.clip.timm_encoder import TimmMapsEncoder

SHAPE = VitShape(patch=8, width=48, depth=4, heads=4, dim=24, feature_blocks=(1, 2, 3))


@pytest.mark.golden
def test_vit_b16_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        network = build_network("clip_segmenter", 2, 3)
    assert isinstance(network, ClipSegmenter)
    assert network.encoder.vision_model.embeddings.position_embedding.weight.shape == (1025, 768)
    assert sum(p.numel() for p in network.encoder.parameters()) == 86_828_544
    head = (*network.decoder.parameters(), *network.presence.parameters())
    assert sum(p.numel() for p in head) == 39_548_416


def test_the_default_shape_is_the_published_one() -> None:
    assert VIT_B16.feature_blocks == (5, 7, 11)
    assert NARROW.depth > max(NARROW.feature_blocks)


@pytest.mark.golden
def test_equals_transformers_own_forward_on_the_same_weights() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    encoder = ClipEncoder(SHAPE, 32).eval()
    for parameter in encoder.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=192,
        projection_dim=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    theirs = CLIPVisionModelWithProjection(config).eval()
    state = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    # the second class embedding, folded into the position table
    embeddings = "vision_model.embeddings."
    state[f"{embeddings}position_embedding.weight"][0] += state[f"{embeddings}class_embedding"]
    theirs.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = encoder(images)
        hidden = theirs(images, output_hidden_states=True)
        tokens = theirs.vision_model.post_layernorm(hidden.hidden_states[4]) @ theirs.visual_projection.weight.mT
    for block, found in zip(SHAPE.feature_blocks, ours.maps, strict=True):
        expected = hidden.hidden_states[block + 1][:, 1:].mT.reshape(2, 48, 4, 4)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.cls, F.normalize(hidden.image_embeds, dim=-1), rtol=1e-5, atol=1e-5)
    dense = F.normalize(tokens[:, 1:], dim=-1).mT.reshape(2, 24, 4, 4)
    torch.testing.assert_close(ours.dense, dense, rtol=1e-5, atol=1e-5)


def test_the_second_class_embedding_matters() -> None:
    torch.manual_seed(0)
    encoder = ClipEncoder(SHAPE, 32).eval()
    images = torch.randn(1, 3, 32, 32)
    twice = encoder(images).cls
    encoder.double_class_embedding = False
    assert (encoder(images).cls - twice).abs().max() > 1e-3


def test_maps_of_images_that_are_not_square_keep_their_cells_in_place() -> None:
    """Without attention and positions a cell depends on its own patch alone: a bright patch shows where it lies."""
    torch.manual_seed(0)
    encoder = ClipEncoder(SHAPE, 32).eval()
    for block in encoder.blocks():
        torch.nn.init.zeros_(block.self_attn.out_proj.weight)
        torch.nn.init.zeros_(block.self_attn.out_proj.bias)
    torch.nn.init.zeros_(encoder.vision_model.embeddings.position_embedding.weight)
    images = torch.zeros(2, 3, 16, 64)
    images[0, :, 8:16, 40:48] = torch.randn(3, 8, 8)
    out = encoder(images)
    for found in (*out.maps, out.dense):
        assert found.shape[2:] == (2, 8)
        changed = (found[0] - found[1]).abs().amax(0) > 1e-4
        assert changed.nonzero().tolist() == [[1, 5]]


def test_sides_that_are_no_multiple_of_the_patch_are_refused() -> None:
    encoder = ClipEncoder(SHAPE, 32)
    with pytest.raises(UsageError, match="no whole number of patches"):
        encoder(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UsageError, match="input_size 30 is no multiple of the patch of 8"):
        ClipEncoder(SHAPE, 30)


def test_positions_are_resized_bilinearly_and_the_first_row_stays() -> None:
    table = torch.cat([torch.full((1, 1), 7.0), torch.tensor([[0.0], [1.0], [2.0], [3.0]])])
    assert resize_positions(table, (2, 2)) is table
    resized = resize_positions(table, (2, 4))
    # half-way cells lie at -1/4, 1/4, 3/4 and 5/4 of a row of two: linear between, constant beyond
    assert resized.flatten().tolist() == [7.0, 0.0, 0.25, 0.75, 1.0, 2.0, 2.25, 2.75, 3.0]


def test_normalisations_compute_in_float32_under_autocast() -> None:
    encoder = ClipEncoder(SHAPE, 32)
    seen: list[torch.dtype] = []
    for part in encoder.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = encoder(torch.randn(1, 3, 32, 32))
    assert len(seen) == 2 + 2 * SHAPE.depth
    assert set(seen) == {torch.float32}
    assert {out.cls.dtype, out.dense.dtype} == {torch.float32}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 50, "heads": 4}, "cannot be built"),
        ({"feature_blocks": (7, 5, 11)}, "do not fit 12 blocks"),
        ({"feature_blocks": (5, 12)}, "do not fit 12 blocks"),
        ({"activation": "relu"}, "unknown activation 'relu'"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VitShape(**sizes)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"patches": 8}, r"option 'encoder\.VitShape\.patches': Unexpected keyword argument"),
        ({"patch": "small"}, r"option 'encoder\.VitShape\.patch': .*integer"),
        ({"heads": 5}, "5 heads, depth 12 and patch 16 cannot be built"),
        ("vit_b32", "unknown backbone 'vit_b32'"),
    ],
)
def test_what_a_recipe_may_say_of_the_encoder(encoder: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network("clip_segmenter", 2, 3, encoder=encoder)


def test_without_transformers_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"need the package transformers\npip install 'perdure\[clip\]'"):
        build_network("clip_segmenter", 2, 3, encoder="narrow")
    out = TimmMapsEncoder("resnet18", 16).eval()(torch.randn(1, 3, 32, 32))  # needs no CLIP
    assert out.cls.shape == (1, 16)


@pytest.mark.parametrize("stride", [8, 16, 32])
def test_a_timm_backbone_gives_three_maps_with_the_same_cells(stride: int) -> None:
    encoder = TimmMapsEncoder("resnet18", 16, stride).eval()
    out = encoder(torch.randn(2, 3, 64, 96))
    assert [found.shape for found in out.maps] == [(2, width, 64 // stride, 96 // stride) for width in (128, 256, 512)]
    assert out.dense.shape == (2, 16, 64 // stride, 96 // stride)
    torch.testing.assert_close(out.dense.norm(dim=1), torch.ones(2, 64 // stride, 96 // stride))
    torch.testing.assert_close(out.cls.norm(dim=1), torch.ones(2))


def test_a_timm_backbone_without_such_maps_is_refused() -> None:
    with pytest.raises(UsageError, match="stride 4 is not possible"):
        TimmMapsEncoder("resnet18", 16, 4)
    with pytest.raises(UsageError, match="unknown backbone 'resnet181'"):
        TimmMapsEncoder("resnet181", 16)
