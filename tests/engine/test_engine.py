"""What the loop does with the phases it is given."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.optim import SGD

from perdure.data.case import Batch
from perdure.data.sampling import Batches, Mix
from perdure.engine.phases import Collect, Generate, Train
from perdure.engine.schedules import poly
from perdure.engine.state import Stateful, load_tree
from perdure.errors import Interrupted, PerdureError, UsageError
from perdure.files import read_tensors


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


def test_the_schedule_reaches_every_group_at_every_step(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method = toy()
    first, last = list(method.body[0].parameters()), list(method.body[2].parameters())
    optimizer = Watched([{"params": first, "lr": 0.1}, {"params": last, "lr": 0.4}], lr=1.0)
    bench().run(method, [train(method, Batches(view(8), 2), optimizer=lambda: optimizer, schedule=poly(), epochs=2)])
    factors = [(1 - step / 8) ** 0.9 for step in range(8)]
    assert optimizer.rates == [[pytest.approx(0.1 * f), pytest.approx(0.4 * f)] for f in factors]


def test_gradients_are_clipped_to_the_norm(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method = toy()
    free, clipped = Watched(method.parameters(), 0.0), Watched(method.parameters(), 0.0)
    batches = Batches(view(8), 4)
    bench().run(method, [train(method, batches, optimizer=lambda: free)])
    bench().run(method, [train(method, batches, optimizer=lambda: clipped, clip=0.01)], task=1)
    assert min(free.norms) > 0.02
    assert clipped.norms == [pytest.approx(0.01, rel=1e-3)] * 2


def test_the_average_of_the_weights_replaces_them(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method = toy()
    seen: list[Tensor] = []
    phase = train(method, Batches(view(8), 2), ema=0.75, after_step=lambda step: seen.append(method.weights()))
    bench().run(method, [phase])
    mean = seen[0]
    for weights in seen[1:]:
        mean = 0.75 * mean + 0.25 * weights
    assert torch.allclose(method.weights(), mean, atol=1e-6)
    assert not torch.allclose(method.weights(), seen[-1], atol=1e-4)


def test_accumulating_two_batches_is_one_batch_of_twice_the_size(bench: Any, train: Any, toy: Any, view: Any) -> None:
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
    bench: Any, train: Any, toy: Any, view: Any, log_every: int
) -> None:
    method = toy()
    run = bench(save_seconds=0, log_every=log_every)
    message = "the loss term 'odd' is not finite: task 1, phase 'train', step 3\n.*lower training.lr"
    with pytest.raises(PerdureError, match=message):
        run.run(method, [train(method, Batches(view(8), 2), loss=nan_from(method, 2))])
    tree = load_tree(run.state)
    assert tree["step"] == 2
    assert all(value.isfinite().all() for value in tree["method"].values())


def test_a_weight_that_is_not_finite_is_not_saved_either(bench: Any, train: Any, toy: Any, view: Any) -> None:
    """A step may leave such a weight behind while its own loss is fine."""
    method = toy()

    def spoil(step: int) -> None:
        if step == 3:
            method.body[0].weight.data.fill_(float("inf"))

    run = bench()
    with pytest.raises(PerdureError, match="a weight is not finite"):
        run.run(method, [train(method, Batches(view(8), 2), after_step=spoil)])
    assert not run.state.exists()


def test_totals_of_a_pass_do_not_depend_on_the_batches(bench: Any, train: Any, toy: Any, view: Any) -> None:
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


def test_a_stop_between_two_phases_saves_and_the_next_run_starts_there(
    bench: Any, train: Any, toy: Any, view: Any
) -> None:
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


def test_the_monitor_is_asked_every_so_many_epochs(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method = toy()
    modes: list[bool] = []

    def measure() -> dict[str, float]:
        method.eval()
        return {"validation.miou.new": 12.5}

    run = bench(validate_every=2)
    phase = train(method, Batches(view(6), 2), epochs=5, after_step=lambda step: modes.append(method.training))
    run.run(method, [phase], validation=measure)
    lines = [line for line in run.lines() if line.get("event") == "validation"]
    assert [(line["step"], line["validation.miou.new"]) for line in lines] == [(6, 12.5), (12, 12.5)]
    assert modes == [True] * 15


def test_what_is_not_trained_stays_asleep(bench: Any, train: Any, toy: Any, view: Any) -> None:
    class Two(Stateful):
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


def test_reading_in_another_process_gives_the_same_weights(bench: Any, train: Any, toy: Any, view: Any) -> None:
    ends = []
    for workers in (0, 1):
        method, run = toy(), bench(workers=workers)
        run.run(method, [train(method, Batches(view(6), 2))])
        run.checkpoint.clear()
        ends.append(method.weights())
    assert torch.equal(*ends)


def test_items_are_made_once_in_order_and_only_where_they_are_missing(bench: Any, train: Any, toy: Any) -> None:
    made: list[int] = []

    def make(index: int, progress: Any) -> dict[str, Tensor]:
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


def test_an_item_under_way_goes_on_where_it_was_saved(bench: Any, toy: Any) -> None:
    worked: list[tuple[int, int]] = []

    def make(index: int, progress: Any) -> dict[str, Tensor]:
        value, begin = (0.0, 0) if progress.saved is None else (progress.saved["value"].item(), progress.saved["step"])
        for step in range(begin, 4):
            value += index + step
            worked.append((index, step))
            progress.checkpoint(step + 1, 4, "", lambda v=value, s=step: {"value": torch.tensor(v), "step": s + 1})
        return {"x": torch.tensor(value)}

    taken: list[Path] = []
    first = bench()
    first.checkpoint.due = lambda step, stopping: (len(worked) == 6, len(worked) == 6)
    with pytest.raises(Interrupted):
        first.run(toy(), [Generate("slow", toy(), 2, make, taken.extend)])
    method, second = toy(), bench()
    second.run(method, [Generate("slow", method, 2, make, taken.extend)])
    assert worked == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert [float(read_tensors(path)["x"]) for path in taken] == [6.0, 10.0]


def test_a_second_data_set_comes_along_with_epochs_of_its_own(bench: Any, train: Any, toy: Any, view: Any) -> None:
    method, seen = toy(), []

    def loss(batch: Any) -> dict[str, Tensor]:
        seen.append((batch.of(0).names, batch.of(1).names))
        assert len(batch.images) == 5 and batch.parts.tolist() == [0, 0, 1, 1, 1]
        return method.loss(batch)

    bench().run(method, [train(method, Mix((Batches(view(8), 2), Batches(view(3), 3))), loss=loss, epochs=1)])
    assert sorted(n for names, _ in seen for n in names) == sorted(view(8).names)
    assert len(seen) == 4
    assert all(sorted(names) == sorted(view(3).names) for _, names in seen)
    assert len({names for _, names in seen}) > 1  # shuffled anew each time


@pytest.mark.parametrize("length", [{"epochs": None}, {"epochs": 1, "steps": 1}])
def test_a_phase_needs_one_length(bench: Any, train: Any, toy: Any, view: Any, length: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="needs either epochs or steps"):
        bench().run(toy(), [train(toy(), Batches(view(4), 2), **length)])


def test_a_phase_without_data_trains_for_its_steps(bench: Any, train: Any, toy: Any) -> None:
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
