from __future__ import annotations

import subprocess
import sys

import pytest

from perdure.errors import UsageError
from perdure.metrics.definitions import DEFINITIONS, describe, figure, variants


def test_full_name_carries_every_option() -> None:
    assert str(figure("miou.all")) == "miou.all[bg=in,absent=skip]"
    assert str(figure(" miou.all [ absent=zero , bg=out ] ")) == "miou.all[bg=out,absent=zero]"
    assert str(figure("forgetting")) == "forgetting[max-last]"
    assert str(figure("forgetting[of=dice,first-last]")) == "forgetting[first-last,of=dice]"
    assert str(figure("forgetting[rule=best-last]")) == "forgetting[best-last]"
    assert str(figure("intransigence[of=miou]")) == "intransigence"


def test_a_tolerance_is_any_number_above_0() -> None:
    assert str(figure("nsd")) == "nsd[mm,2]"
    assert str(figure("nsd[3.50]")) == str(figure("nsd[mm,tolerance=3.5]")) == "nsd[mm,3.5]"
    assert str(figure("nsd[mm,1,ci-low]")) == "nsd[mm,1,ci-low]"
    assert "Within 3.5 mm of" in figure("nsd[3.5]").meaning
    assert [str(fig) for fig in variants(DEFINITIONS["nsd"], tolerance=1.5)][:2] == ["nsd[mm,1.5]", "nsd[mm,1.5,sd]"]
    assert str(figure("hd95")) == "hd95[mm]" and str(figure("dice.cases[sd]")) == "dice.cases[sd]"


def test_default_of_bg_follows_the_data_but_never_overrides_what_is_written() -> None:
    assert str(figure("miou.all", background=False)) == "miou.all[bg=out,absent=skip]"
    assert str(figure("miou.all[bg=in]", background=False)) == "miou.all[bg=in,absent=skip]"


@pytest.mark.parametrize("definition", DEFINITIONS.values(), ids=DEFINITIONS)
def test_names_of_all_variants_parse_back_and_differ(definition) -> None:
    names = [str(v) for v in variants(definition, definition.kinds[0])]
    assert len(set(names)) == len(names) >= 1
    assert [str(figure(n)) for n in names] == names
    assert definition.meaning.endswith(".")
    low, high = definition.range
    assert low is None or high is None or low < high
    assert all(meaning.endswith(".") for o in definition.options for meaning in o.meaning.values())


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("miou.al", "unknown figure 'miou.al'", "did you mean 'miou.all'?"),
        ("miou.all[bg=inn]", "'miou.all' has no bg=inn", "did you mean 'in'?"),
        ("miou.all[absnt=skip]", "figure 'miou.all' has no option 'absnt=skip'", "did you mean 'absent=skip'?"),
        ("miou.all[skip]", "figure 'miou.all' has no option 'skip'", "did you mean 'absent=skip'?"),
        ("forgetting[max]", "figure 'forgetting' has no option 'max'", "did you mean 'max-last'?"),
        ("miou.new[bg=in]", "'miou.new' has no bg=in", "known: ignored, out"),
        ("miou.all[bg=in,bg=out]", "option 'bg' is given twice", "give each option once"),
        ("iou[bg=in]", "figure 'iou' has no options", "write 'iou' alone"),
        ("fwt[before]", "figure 'fwt' has no options", "write 'fwt' alone"),
        ("accuracy.average[of=miou]", "has no option 'of=miou'", "write miou.average"),
        ("accuracy.average[of=balanced,bg=out]", "has no option 'of=balanced'", "write balanced.average"),
        ("hd95[px]", "figure 'hd95' has no option 'px'", "known: ci-high, ci-low, mean, mm, sd"),
        ("nsd[mm,0]", "figure 'nsd' has no option '0'", "known: 2, ci-high, ci-low, mean, mm, sd"),
        ("nsd[tolerance=-1]", "'nsd' has no tolerance=-1", "give a number above 0"),
        ("nsd[mm,2,3]", "option 'tolerance' is given twice", "give each option once"),
        ("mIoU (all)", "'mIoU (all)' is not a figure's name", "write it like"),
    ],
)
def test_plain_errors(text: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        figure(text)
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_table_is_plain_and_complete() -> None:
    table = {entry["name"]: entry for entry in describe()}
    wanted = {"miou.all", "miou.old", "miou.new", "hiou", "dice.all", "accuracy.all", "accuracy.mean", "iou", "dice"}
    wanted |= {"forgetting", "bwt", "intransigence", "recall", "precision"}
    wanted |= {"miou.average", "dice.average", "accuracy.average", "balanced.average"}
    wanted |= {"dice.cases", "hd95", "asd", "nsd", "dice.tasks", "wcd", "bwtr", "rma", "e-fwt", "fwt", "mpe", "drr"}
    wanted |= {"forgetting.appearance", "forgetting.semantics"}
    assert set(table) == wanted
    assert table["forgetting"]["better"] == "lower"
    assert table["forgetting"]["unit"] == "points"
    assert table["miou.all"]["default"] == "miou.all[bg=in,absent=skip]"
    assert all(e["unit"] and e["meaning"] and e["source"] for e in table.values())
    assert table["iou"]["kinds"] == ["segmentation"]
    assert table["recall"]["kinds"] == ["segmentation", "classification"]


def test_variants_that_fit_images_with_one_class() -> None:
    assert [d.name for d in DEFINITIONS.values() if variants(d, "classification")] == [
        *("accuracy.all", "accuracy.mean", "accuracy.average", "balanced.average", "forgetting", "bwt"),
        *("intransigence", "mpe", "drr", "recall", "precision"),
    ]
    assert list(map(str, variants(DEFINITIONS["accuracy.all"], "classification"))) == ["accuracy.all[bg=out]"]
    assert list(map(str, variants(DEFINITIONS["intransigence"], "classification"))) == [
        "intransigence[of=accuracy]",
        "intransigence[of=balanced]",
    ]
    assert list(map(str, variants(DEFINITIONS["intransigence"]))) == ["intransigence"]


def test_title_of_a_mean_over_tasks_says_of_what() -> None:
    assert figure("miou.average").title == "mIoU, average over tasks"
    assert figure("balanced.average").title == "balanced accuracy, average over tasks"
    assert figure("accuracy.all").title == "accuracy"


def test_definitions_and_figures_load_neither_torch_nor_matplotlib() -> None:
    code = (
        "import perdure.metrics.definitions, sys; assert 'numpy' not in sys.modules\n"
        "import perdure.metrics.figures, perdure.metrics.results, sys\n"
        "import perdure.report.compare_page, perdure.report.page\n"
        "assert not {'torch', 'matplotlib', 'jinja2', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
