"""What the loop does with the phases it is given."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.optim import SGD

from perdure.data.views import Batch
from perdure.engine.interrupt import Interrupted
from perdure.engine.machine import Machine
from perdure.engine.options import EngineOptions
from perdure.engine.phases import Batches, Collect, Generate, Train
from perdure.engine.schedules import poly
from perdure.engine.state import load_tree
from perdure.errors import PerdureError, UsageError
from perdure.networks.segmenter import Segmenter


class Watched(SGD):
    """Notes learning rates and the size of the gradient at every step."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, lr=lr)
        self.rates: list[list[float]] = []
        self.norms: list[float] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        grads = [p.grad.flatten() for g in self.param_groups for p in g["params"] if p.grad is not None]
        self.norms.append(float(torch.cat(grads).norm()))
        self.rates.append([g["lr"] for g in self.param_groups])
        super().step(closure)


def train(method: Any, batches: Batches | None, **options: Any) -> Train:
    given = {"optimizer": lambda: SGD(method.parameters(), lr=0.5), "epochs": 1, **options}
    return Train(
        "train", method, given.pop("loss", method.loss), data=None if batches is None else lambda: batches, **given
    )


def test_the_schedule_reaches_every_group_at_every_step(bench: Any, toy: Any, view: Any) -> None:
    method = toy()
    first, last = list(method.body[0].parameters()), list(method.body[2].parameters())
    optimizer = Watched([{"params": first, "lr": 0.1}, {"params": last, "lr": 0.4}], lr=1.0)
    bench().run(method, [train(method, Batches(view(8), 2), optimizer=lambda: optimizer, schedule=poly(), epochs=2)])
    factors = [(1 - step / 8) ** 0.9 for step in range(8)]
    assert optimizer.rates == [[pytest.approx(0.1 * f), pytest.approx(0.4 * f)] for f in factors]


def test_gradients_are_clipped_to_the_norm(bench: Any, toy: Any, view: Any) -> None:
    method = toy()
    free, clipped = Watched(method.parameters(), 0.0), Watched(method.parameters(), 0.0)
    batches = Batches(view(8), 4)
    bench().run(method, [train(method, batches, optimizer=lambda: free)])
    bench().run(method, [train(method, batches, optimizer=lambda: clipped, clip=0.01)], task=1)
    assert min(free.norms) > 0.02
    assert clipped.norms == [pytest.approx(0.01, rel=1e-3)] * 2


def test_the_average_of_the_weights_replaces_them(bench: Any, toy: Any, view: Any) -> None:
    method = toy()
    seen: list[Tensor] = []
    phase = train(method, Batches(view(8), 2), ema=0.75, after_step=lambda step: seen.append(method.weights()))
    bench().run(method, [phase])
    mean = seen[0]
    for weights in seen[1:]:
        mean = 0.75 * mean + 0.25 * weights
    assert torch.allclose(method.weights(), mean, atol=1e-6)
    assert not torch.allclose(method.weights(), seen[-1], atol=1e-4)


def test_accumulating_two_batches_is_one_batch_of_twice_the_size(bench: Any, toy: Any, view: Any) -> None:
    ends, losses = [], []
    for size, accumulate in [(8, 1), (4, 2)]:
        method, run = toy(), bench()
        run.run(method, [train(method, Batches(view(16), size), accumulate=accumulate, epochs=3)])
        run.checkpoint.clear()
        ends.append(method.weights())
        losses.append([line["loss"] for line in run.lines()[-6:]])
        assert [line["epoch"] for line in run.lines()[-6:]] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert torch.allclose(ends[0], ends[1], atol=1e-6)


def test_bf16_computes_in_bf16_and_keeps_weights_in_fp32(bench: Any, toy: Any, view: Any) -> None:
    method = toy()
    before = method.weights()
    bench(precision="bf16").run(method, [train(method, Batches(view(4), 2))])
    assert method.dtypes == {torch.bfloat16}
    assert method.weights().dtype == torch.float32
    assert not torch.equal(before, method.weights())


def test_a_phase_may_ask_for_another_precision_than_the_run(bench: Any, toy: Any, view: Any) -> None:
    method = toy()
    bench(precision="bf16").run(method, [train(method, Batches(view(4), 2), precision="fp32")])
    assert method.dtypes == {torch.float32}


def test_fp16_is_refused_on_a_cpu(bench: Any, toy: Any, view: Any) -> None:
    with pytest.raises(UsageError, match=r"fp16 is unusable on a CPU\nuse bf16 or fp32"):
        Machine(EngineOptions(precision="fp16", device="cpu"))
    with pytest.raises(UsageError, match="computes in fp16, the run in fp32"):
        bench().run(toy(), [train(toy(), Batches(view(4), 2), precision="fp16")])


class WithSegmenter(nn.Module):
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
def test_compiled_training_is_close_to_plain_training(bench: Any, toy: Any, view: Any, kind: str) -> None:
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


def nan_from(method: Any, step: int) -> Callable[[Batch], dict[str, Tensor]]:
    """The loss of ``method`` with a second term that is NaN from a step on."""
    calls = 0

    def loss(batch: Batch) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {**method.loss(batch), "odd": torch.tensor(float("nan") if calls > step else 0.0)}

    return loss


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_is_named_and_nothing_of_it_is_saved(
    bench: Any, toy: Any, view: Any, log_every: int
) -> None:
    method = toy()
    run = bench(save_seconds=0, log_every=log_every)
    message = "the loss term 'odd' is not finite: task 1, phase 'train', step 3\n.*lower training.lr"
    with pytest.raises(PerdureError, match=message):
        run.run(method, [train(method, Batches(view(8), 2), loss=nan_from(method, 2))])
    tree = load_tree(run.state)
    assert tree["step"] == 2
    assert all(value.isfinite().all() for value in tree["method"].values())


def test_a_weight_that_is_not_finite_is_not_saved_either(bench: Any, toy: Any, view: Any) -> None:
    """A step may leave such a weight behind while its own loss is fine."""
    method = toy()

    def spoil(step: int) -> None:
        if step == 3:
            method.body[0].weight.data.fill_(float("inf"))

    run = bench()
    with pytest.raises(PerdureError, match="a weight is not finite"):
        run.run(method, [train(method, Batches(view(8), 2), after_step=spoil)])
    assert not run.state.exists()


def test_totals_of_a_pass_do_not_depend_on_the_batches(bench: Any, toy: Any, view: Any) -> None:
    def measure(batch: Batch) -> dict[str, Tensor]:
        assert not method.training
        assert not torch.is_grad_enabled()
        return {"sum": batch.images.double().sum((0, 2, 3)), "pixels": torch.tensor(batch.labels.numel())}

    found: list[dict[str, Tensor]] = []
    for task, size in enumerate((1, 3, 7)):
        method = toy()
        batches = Batches(view(7), size, drop_last=False)
        bench().run(method, [Collect("sum", method, lambda batches=batches: batches, measure, found.append)], task)
    assert [int(totals["pixels"]) for totals in found] == [7 * 64] * 3
    for totals in found[1:]:
        assert torch.allclose(totals["sum"], found[0]["sum"], rtol=1e-12)


def test_a_stop_between_two_phases_saves_and_the_next_run_starts_there(bench: Any, toy: Any, view: Any) -> None:
    began: list[str] = []

    def phases(method: Any, stop: bool) -> list[Train]:
        def finish() -> None:
            if stop:
                os.kill(os.getpid(), signal.SIGTERM)

        def data() -> Batches:
            began.append("second")
            return Batches(view(4), 2)

        first = train(method, Batches(view(4), 2), finish=finish)
        return [first, Train("second", method, method.loss, lambda: SGD(method.parameters(), lr=0.1), data, epochs=1)]

    method, run = toy(), bench()
    with pytest.raises(Interrupted, match="stopped in task 1, phase 'train'"):
        run.run(method, phases(method, stop=True))
    assert began == []
    fresh = toy()
    bench().run(fresh, phases(fresh, stop=False))
    assert began == ["second"]
    steps = [(line["phase"], line["step"], line["run_step"]) for line in run.lines()]
    assert steps == [("train", 1, 1), ("train", 2, 2), ("second", 1, 3), ("second", 2, 4)]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_monitor_is_asked_every_so_many_epochs(bench: Any, toy: Any, view: Any) -> None:
    method = toy()
    modes: list[bool] = []

    def measure() -> dict[str, float]:
        method.eval()
        return {"monitor.miou.new": 12.5}

    run = bench(monitor_every=2)
    phase = train(method, Batches(view(6), 2), epochs=5, after_step=lambda step: modes.append(method.training))
    run.run(method, [phase], monitor=measure)
    lines = [line for line in run.lines() if line.get("event") == "monitor"]
    assert [(line["step"], line["monitor.miou.new"]) for line in lines] == [(6, 12.5), (12, 12.5)]
    assert modes == [True] * 15


def test_what_is_not_trained_stays_asleep(bench: Any, toy: Any, view: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained, self.helper = toy(), nn.Dropout()

    method = Two()
    modes: list[tuple[bool, bool]] = []
    phase = train(
        method.trained,
        Batches(view(4), 2),
        after_step=lambda step: modes.append((method.trained.training, method.helper.training)),
    )
    bench().run(method, [phase])
    assert modes == [(True, False)] * 2


def test_the_log_holds_each_term_and_goes_on_where_it_was(bench: Any, toy: Any, view: Any) -> None:
    method, run = toy(), bench(log_every=2)
    run.run(method, [train(method, Batches(view(10), 2))])
    lines = run.lines()
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {"seconds", "task", "phase", "step", "of", "epoch", "run_step", "lr", "loss", "fit"} == set(lines[0])
    assert lines[0]["loss"] == lines[0]["fit"]
    with (run.folder / "log.jsonl").open("a") as log:
        log.write('{"seconds": 99')  # a kill in the middle of a line
    again = bench(log_every=2)
    again.run(method, [train(method, Batches(view(4), 2))], task=1)
    *earlier, last = again.lines()
    assert earlier == lines
    assert (last["task"], last["step"], last["run_step"]) == (1, 2, 7)
    assert last["seconds"] >= lines[-1]["seconds"]


def test_tensorboard_files_hold_the_curves_and_no_name_of_this_machine(bench: Any, toy: Any, view: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for task in range(2):
        run = bench(trackers=["tensorboard"])
        method = toy()
        run.run(method, [train(method, Batches(view(6), 2))], task)
        run.engine.machine.stop_trackers()
        run.checkpoint.clear()
    files = sorted(p.name for p in (run.folder / "tracking" / "toy").iterdir())
    assert files == ["events.out.tfevents.000000.perdure", "events.out.tfevents.000001.perdure"]
    assert not any(socket.gethostname() in name for name in files)
    shown = EventAccumulator(str(run.folder / "tracking" / "toy")).Reload()
    assert "task0/train/fit" in shown.Tags()["scalars"]
    logged = {line["run_step"]: line["loss"] for line in run.lines() if line["task"] == 1}
    curve = {event.step: event.value for event in shown.Scalars("task1/train/loss")}
    assert sorted(curve) == sorted(logged) == [4, 5, 6]
    assert all(curve[step] == pytest.approx(logged[step]) for step in curve)


def test_a_tracker_that_is_not_installed_is_a_plain_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="names wandb, which is not installed"):
        Machine(EngineOptions(device="cpu", trackers=("wandb",)), tmp_path)


def test_reading_in_another_process_gives_the_same_weights(bench: Any, toy: Any, view: Any) -> None:
    ends = []
    for workers in (0, 1):
        method, run = toy(), bench(workers=workers)
        run.run(method, [train(method, Batches(view(6), 2))])
        run.checkpoint.clear()
        ends.append(method.weights())
    assert torch.equal(*ends)


def test_items_are_made_once_in_order_and_only_where_they_are_missing(bench: Any, toy: Any) -> None:
    made: list[int] = []

    def make(index: int) -> dict[str, Tensor]:
        made.append(index)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"x": torch.rand(1)}

    taken: list[Path] = []
    for _ in range(2):
        method = toy()
        try:
            bench().run(method, [Generate("dream big", method, 4, make, taken.extend)])
        except KeyboardInterrupt:
            assert taken == []
    assert made == [0, 1, 2, 2, 3]
    assert [path.stem for path in taken] == ["000000", "000001", "000002", "000003"]


@pytest.mark.parametrize("length", [{"epochs": None}, {"epochs": 1, "steps": 1}])
def test_a_phase_needs_one_length(bench: Any, toy: Any, view: Any, length: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="needs either epochs or steps"):
        bench().run(toy(), [train(toy(), Batches(view(4), 2), **length)])


def test_a_phase_without_data_trains_for_its_steps(bench: Any, toy: Any) -> None:
    method = toy()

    def loss(batch: None) -> dict[str, Tensor]:
        assert batch is None
        return {"size": torch.stack([p.square().sum() for p in method.parameters()]).sum()}

    run = bench()
    optimizer = SGD(method.parameters(), lr=0.1)
    run.run(method, [train(method, None, loss=loss, optimizer=lambda: optimizer, epochs=None, steps=3)])
    sizes = [line["size"] for line in run.lines()]
    assert len(sizes) == 3
    assert sizes[2] < sizes[1] < sizes[0]
