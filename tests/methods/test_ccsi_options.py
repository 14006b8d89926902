"""Profiles and settings a task."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from perdure.methods.ccsi.options import FAITHFUL, CcsiOptions


def test_the_faithful_profile_differs_in_what_it_says_and_nothing_else() -> None:
    clean, faithful = CcsiOptions().model_dump(), CcsiOptions(profile="faithful").model_dump()
    differing = {key for key in clean if clean[key] != faithful[key]}
    assert differing == {"profile", *FAITHFUL}
    inside = {key for key in clean["synthesis"] if clean["synthesis"][key] != faithful["synthesis"][key]}
    assert inside == set(FAITHFUL["synthesis"])
    assert faithful["synthesis"]["steps"] == 5000 and faithful["groups"] == (16, 24, 30)


def test_what_is_given_wins_over_the_profile() -> None:
    options = CcsiOptions.model_validate({"profile": "faithful", "balance": "sampler", "synthesis": {"steps": 200}})
    assert options.balance == "sampler" and options.synthesis.steps == 200
    assert options.replacement and options.synthesis.jitter == 30


def test_a_profile_that_is_written_out_reads_as_itself() -> None:
    for profile in ("clean", "faithful"):
        options = CcsiOptions.model_validate({"profile": profile, "by_task": [{"share": 0.5}]})
        assert CcsiOptions.model_validate(options.model_dump()) == options
        assert CcsiOptions.model_validate_json(options.model_dump_json()) == options


def test_settings_by_task() -> None:
    entries = [{"idc_momentum": 0.5, "synthesis": {"tv2": 0.1}}, {"share": 0.5}]
    options = CcsiOptions.model_validate({"synthesis": {"steps": 700}, "by_task": entries})
    found = [options.at(task) for task in range(4)]
    assert [o.idc_momentum for o in found] == [0.9, 0.5, 0.9, 0.9]
    assert [o.synthesis.tv2 for o in found] == [0.01, 0.1, 0.01, 0.01]
    assert [o.share for o in found] == [0.66, 0.66, 0.5, 0.5]
    assert {o.synthesis.steps for o in found} == {700}


@pytest.mark.parametrize(
    ("entry", "message"),
    [({"shaer": 0.5}, "shaer"), ({"profile": "faithful"}, "cannot change 'profile'"), ({"share": 2}, "less than 1")],
)
def test_wrong_settings_of_a_task_are_found_before_the_run(entry: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CcsiOptions.model_validate({"by_task": [{}, entry]})


def test_how_many_groups_stand_for_the_past() -> None:
    published = CcsiOptions(groups=(16, 24, 30))
    assert [published.groups_before(task, 2 * task) for task in (1, 2, 3, 4)] == [16, 24, 30, 30]
    each = CcsiOptions(per_class=100)
    assert [each.groups_before(1, classes) for classes in (1, 2, 3, 7)] == [3, 5, 8, 18]  # of 40, rounded up
