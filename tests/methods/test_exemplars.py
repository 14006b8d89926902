"""Exemplars: which training samples are kept, how they come back, and what is said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from perdure.data.case import Batch, Case
from perdure.data.dataset import Draw
from perdure.data.preparation import Preparation
from perdure.data.tensors import FileSamples
from perdure.engine.state import Stateful
from perdure.errors import UsageError
from perdure.files import write_tensors
from perdure.kept.store import FileStore
from perdure.methods.exemplars import ExemplarOptions, Exemplars, _stored, choose
from perdure.methods.finetune import Finetune, FinetuneOptions
from perdure.methods.lwf import Lwf, LwfOptions
from perdure.methods.past import Judge, Mirrored
from perdure.networks.build import build_network
from perdure.streams.task import Stream, Task


def chosen(shown: list[set[int]], count: int, first: int = 0, ids: tuple[int, ...] = (1, 2, 3)) -> list[int] | None:
    return choose(len(shown), count, first, ids, lambda place: frozenset(shown[place]))


def test_exemplars_lie_evenly_spread() -> None:
    everywhere = [{0, 1, 2, 3}] * 10
    assert chosen(everywhere, 5) == [0, 2, 4, 6, 8]
    assert chosen(everywhere, 5, first=3) == [3, 5, 7, 9, 1]
    assert chosen(everywhere, 4, first=9) == [9, 1, 4, 6]
    assert sorted(chosen(everywhere, 10, first=7) or ()) == list(range(10))


def test_every_class_is_there_that_the_set_shows() -> None:
    rare = [{0, 1, 2}] * 10
    rare[7] = {0, 3}
    assert chosen(rare, 5) == [0, 2, 4, 6, 7]  # the last one whose classes others show makes way
    assert chosen(rare, 2) == [0, 7]
    # one that alone shows a class stays
    assert chosen([{1}, {1}, {1}, {2}, {1}, {3}], 3) == [0, 5, 3]
    assert chosen([{1}] * 4, 2) == [0, 2]  # no sample shows 2 and 3
    assert chosen([{1}, {2}, {3}], 2) is None


def test_no_more_is_read_than_needed() -> None:
    read = []

    def shown(place: int) -> frozenset[int]:
        read.append(place)
        return frozenset({1, 2})

    choose(1000, 4, 0, (1, 2), shown)
    assert set(read) == {0, 250, 500, 750}


@pytest.mark.parametrize("seed", range(20))
def test_as_many_exemplars_as_classes_are_always_enough(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    table = torch.rand(12, 5, generator=draw) < 0.15
    shown = [set((row.nonzero()[:, 0] + 1).tolist()) for row in table]
    found = chosen(shown, 5, seed % 12, (1, 2, 3, 4, 5))
    assert found is not None and len(set(found)) == 5
    assert set().union(*(shown[place] for place in found)) == set().union(*shown)


@pytest.fixture
def kept(make_blocks: Callable[..., Stream], tmp_path: Path) -> Callable[..., tuple[Exemplars, Stateful, Stream]]:
    """Exemplars of the first task, stored, where the second one has begun."""

    def go(per_task: int = 3, seed: int = 5) -> tuple[Exemplars, Stateful, Stream]:
        stream, past, owner = make_blocks([(1, 2), (3,)]), Exemplars(ExemplarOptions(per_task=per_task)), Stateful()
        owner.store = FileStore(tmp_path / f"kept{per_task}-{seed}")
        first, second = stream.tasks
        torch.manual_seed(seed)
        past.begin(first)
        with stream.opened(first):
            (phase,) = past.learn(owner, first)
            names = tuple(f"{index}.safetensors" for index in range(phase.count))  # type: ignore[union-attr]
            for index, name in enumerate(names):
                owner.store.write(name, phase.make(index, None))  # type: ignore[union-attr,arg-type]
        owner.files[phase.keep] = names  # type: ignore[union-attr,index]
        past.begin(second)
        return past, owner, stream

    return go


def test_exemplars_are_training_samples_with_their_labels(kept: Callable[..., Any]) -> None:
    past, owner, stream = kept()
    first, second = stream.tasks
    (samples,) = past.samples(owner, second)
    assert len(samples) == past.replayed(owner) == 3
    with stream.opened(first):
        real = [first.train()[Draw(i)] for i in range(6)]
    for i in range(3):
        one = samples[Draw(i)]
        (same,) = [case for case in real if torch.equal(case.image, one.image)]
        assert torch.equal(one.label, same.label) and one.label.dtype == torch.int64
        assert one.annotated == {1, 2}
    assert past.generate(owner, second, Judge(torch.nn.Identity(), torch.nn.Identity())) == []
    listed = past.kept("past.")
    assert [(item.name, item.kind, item.files) for item in listed] == [
        ("exemplars-1+2", "exemplars", "exemplars-00"),
        ("exemplars-3", "exemplars", "exemplars-01"),
    ]
    assert all("real training samples" in item.made_from for item in listed)


def test_the_seed_of_the_task_decides_and_a_small_set_is_kept_whole(kept: Callable[..., Any]) -> None:
    def images(seed: int) -> list[float]:
        past, owner, stream = kept(2, seed)
        (samples,) = past.samples(owner, stream.tasks[1])
        return [float(samples[Draw(i)].image.sum()) for i in range(len(samples))]

    again, same, other = images(5), images(5), images(6)
    assert again == same and again != other
    assert kept(100)[0].replayed(kept(100)[1]) == 6


def test_too_few_exemplars_for_the_classes_are_an_error(make_blocks: Callable[..., Stream]) -> None:
    task, past = make_blocks([(1, 2)]).tasks[0], Exemplars(ExemplarOptions(per_task=1))
    past.begin(task)
    cases = [Case(torch.zeros(3, 4, 4), torch.full((4, 4), label), "") for label in (1, 2, 1)]
    with pytest.raises(UsageError, match=r"1 exemplars cannot show all 2 classes of task '1\+2'") as told:
        past._choose(cases, past.tasks[0], cases.__getitem__)  # type: ignore[arg-type]
    assert told.value.hint == "set method.exemplars.per_task=2 or more"
    with pytest.raises(ValidationError):
        ExemplarOptions(per_task=0)


def test_what_a_case_annotates_is_kept_with_it(tmp_path: Path) -> None:
    case = Case(torch.rand(1, 4, 4), torch.tensor([[0, 1], [255, 1]]).repeat(2, 2), "a", frozenset({1}))
    write_tensors(tmp_path / "a.safetensors", _stored(case))
    write_tensors(tmp_path / "b.safetensors", _stored(Case(case.image, case.label, "b")))
    one, two = (FileSamples([tmp_path / f"{n}.safetensors"], Mirrored(), frozenset({1, 2}))[0] for n in "ab")
    assert one.annotated == {1} and two.annotated == {1, 2}
    assert torch.equal(one.label, case.label) and torch.equal(one.image, case.image)


def test_mirroring_turns_image_and_mask_together() -> None:
    case = Case(torch.arange(16.0).view(1, 4, 4), torch.arange(16).view(4, 4), "a")
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        one = Mirrored(axes=(1,)).train(case)
        assert torch.equal(one.image[0].long(), one.label)
        seen.add(int(one.label[0, 0]))
    assert seen == {0, 3}
    whole = Mirrored(axes=(0,)).train(Case(case.image, torch.tensor(7), "a"))
    assert whole.label.shape == () and int(whole.label) == 7


def test_tasks_with_samples_of_other_sizes_are_refused() -> None:
    past = Exemplars(ExemplarOptions())
    one = Task(0, "one", (1,), (), frozenset({1}), preparation=Preparation(patch=(16, 16)))
    two = Task(1, "two", (2,), (1,), frozenset({2}), preparation=Preparation(patch=(8, 8)))
    past.begin(one)
    with pytest.raises(UsageError, match="task 'two' are 8×8, exemplars of task 'one' 16×16"):
        past.begin(two)


@pytest.fixture
def classifier(make_setup: Callable[..., Any]) -> Callable[..., Any]:
    """A method for whole images with exemplars."""

    def make(kind: Any, options: Any, **given: Any) -> Any:
        setup = make_setup(options.model_validate({"replay": "exemplars", **given}))
        return kind(replace(setup, build=partial(build_network, "cosine_resnet", 2, 3, size="small")))

    return make


@pytest.mark.parametrize(("kind", "options"), [(Finetune, FinetuneOptions), (Lwf, LwfOptions)])
def test_whole_images_are_replayed(
    kind: Any, options: Any, classifier: Callable[..., Any], make_blocks: Callable[..., Stream]
) -> None:
    method = classifier(kind, options)
    for task in make_blocks([(1, 2), (3,)]).tasks:
        method.begin(task)
    images, parts = torch.rand(4, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    batch = Batch(images, torch.tensor([3, 3, 1, 2]), tuple("abcd"), parts)
    terms = method.train().loss(batch)
    logits = method.network.classify(method.network.features(images))
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 2, 0, 1]))
    torch.testing.assert_close(terms["current"].detach(), wanted.detach())
    # the old network is still asked about old classes, which new images do not show
    assert kind is Finetune or float(terms["distill"].detach()) > 0


def test_the_newest_classifier_alone_cannot_learn_old_images(classifier: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="channels=new does not learn"):
        classifier(Finetune, FinetuneOptions, channels="new")


def test_volumes_are_replayed_too(make_setup: Callable[..., Any], make_blocks: Callable[..., Stream]) -> None:
    method = Lwf(make_setup(LwfOptions.model_validate({"replay": "exemplars"}), dims=3))
    for task in make_blocks([(1, 2), (3,)], 3).tasks:
        method.begin(task)
    labels = torch.zeros(2, 8, 8, 8).long()
    labels[0, :4], labels[1, :4] = 3, 1
    terms = method.loss(Batch(torch.rand(2, 3, 8, 8, 8), labels, ("a", "b"), torch.tensor([0, 1])))
    assert set(terms) == {"current", "distill"} and all(value.isfinite() for value in terms.values())
