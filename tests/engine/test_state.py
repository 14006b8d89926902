"""States on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from perdure.engine.state import load_tree, restore, save_tree
from perdure.errors import DataError, RunError


def test_optimizer_state_comes_back_and_training_goes_on_the_same(tmp_path: Path) -> None:
    def made() -> tuple[nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        layer(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = made()
    step(layer, optimizer)
    save_tree(
        tmp_path / "s.safetensors", {"o": optimizer.state_dict(), "m": layer.state_dict(), "n": None, "x": [1, 2.5]}
    )
    step(layer, optimizer)
    other, again = made()
    tree = load_tree(tmp_path / "s.safetensors")
    restore(other, tree["m"])
    again.load_state_dict(tree["o"])
    step(other, again)
    assert torch.equal(other.weight, layer.weight)
    assert tree["n"] is None
    assert tree["x"] == [1, 2.5]


class Growing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("rows", torch.zeros(0, 3))
        self.register_buffer("now", None)


def test_buffers_of_any_shape_are_restored_and_absent_ones_become_none() -> None:
    full, empty = Growing(), Growing()
    full.rows, full.now = torch.ones(4, 3), torch.tensor(2.0)
    restore(empty, full.state_dict())
    assert empty.rows.shape == (4, 3)
    assert float(empty.now) == 2.0
    restore(empty, Growing().state_dict())
    assert empty.rows.shape == (0, 3)
    assert empty.now is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer.weight"), "lack 1 tensors"),
        (lambda s: s.update({"layer.weight": torch.zeros(5, 5)}), "shape"),
        (lambda s: s.update({"other.thing": torch.zeros(1)}), "does not have"),
    ],
)
def test_weights_of_another_network_are_refused(change, message: str) -> None:
    state = dict(Growing().state_dict())
    change(state)
    with pytest.raises(RunError, match=message):
        restore(Growing(), state)


def test_damaged_state_is_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "s.safetensors").write_bytes(b"not a state")
    with pytest.raises(DataError, match="not a readable safetensors"):
        load_tree(tmp_path / "s.safetensors")


def test_a_state_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_tree(path, {"x": torch.arange(4.0), "step": 3})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(RunError, match="damaged or was changed"):
        load_tree(path)
