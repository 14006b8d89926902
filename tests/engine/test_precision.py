"""Precisions, GPUs and compiled networks."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn

from perdure.data.case import Batch
from perdure.data.sampling import Batches
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.state import Stateful
from perdure.errors import UsageError
from perdure.networks.segmenter import Segmenter


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method = toy()
    before = method.weights()
    bench(precision="bf16").run(method, [train(method, Batches(view(4), 2))])
    assert method.dtypes == {torch.bfloat16}
    assert method.weights().dtype == torch.float32
    assert not torch.equal(before, method.weights())


def test_a_phase_may_ask_for_another_precision_than_the_run(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method = toy()
    bench(precision="bf16").run(method, [train(method, Batches(view(4), 2), precision="fp32")])
    assert method.dtypes == {torch.float32}


def test_fp16_is_refused_on_a_cpu(bench: Any, train: Any, toy: Any, view: Any) -> None:
    with pytest.raises(UsageError, match=r"fp16 is unusable on a CPU\nuse bf16 or fp32"):
        Machine(EngineOptions(precision="fp16", device="cpu"))
    with pytest.raises(UsageError, match="computes in fp16, the run in fp32"):
        bench().run(toy(), [train(toy(), Batches(view(4), 2), precision="fp16")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_gpu_trains_in_half_precision(bench: Any, train: Any, toy: Any, view: Any, precision: str) -> None:
    """Also with clipping, which has to undo the scaling of fp16 first, and picked up in the middle."""
    ends = []
    for stop_at in (3, None):
        method = toy()
        phase = train(
            method, Batches(view(8), 2), clip=0.1, epochs=2, after_step=lambda step, at=stop_at: stop(step, at)
        )
        try:
            bench(device="cuda", precision=precision, save_seconds=0).run(method, [phase])
        except KeyboardInterrupt:
            method = toy()
            phase = train(method, Batches(view(8), 2), clip=0.1, epochs=2)
            bench(device="cuda", precision=precision).run(method, [phase])
        bench(device="cuda", precision=precision).checkpoint.clear()
        ends.append(method.weights().cpu())
    assert torch.allclose(ends[0], ends[1], atol=1e-3)
    assert not torch.allclose(ends[0], toy().weights(), atol=1e-3)


def stop(step: int, at: int | None) -> None:
    if step == at:
        raise KeyboardInterrupt


class WithSegmenter(Stateful):
    """A method calls the halves of its network, never the network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Segmenter(nn.Conv2d(3, 4, 3, padding=1), 4, 1, 2)
        self.network.grow(2)
        self.body = self.network.body

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        return {"fit": self.network.classify(self.network.features(batch.images)).square().mean()}

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters()])


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="needs a C compiler")
@pytest.mark.parametrize("kind", ["toy", "segmenter"])
def test_compiled_training_is_close_to_plain_training(bench: Any, train: Any, toy: Any, view: Any, kind: str) -> None:
    ends = []
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    for compiled in (False, True):
        assert graphs["unique_graphs"] == 0
        method, run = toy() if kind == "toy" else WithSegmenter(), bench(compile=compiled)
        run.run(method, [train(method, Batches(view(8), 4), epochs=2)])
        run.checkpoint.clear()
        ends.append(method.weights())
        assert method.body._compiled_call_impl is None  # what follows, with inputs of any size, is not compiled
    assert graphs["unique_graphs"] > 0
    assert torch.allclose(ends[0], ends[1], atol=1e-5)
