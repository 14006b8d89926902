"""Which cases are for testing: those that the data set gives for it, otherwise one of nnU-Net's own folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from perdure.data.readers.casefiles import CaseFiles, Layout
from perdure.data.source import SPLITS, Split
from perdure.errors import DataError, UsageError, nearest
from perdure.files import read_json

FOLDS: Final = 5
SEED: Final = 12345
"""Number of folds and seed of nnU-Net v2 (``nnunetv2.utilities.crossval_split``)."""
SPLITS_FILE: Final = "splits_final.json"


def divided(
    root: Path,
    endings: Sequence[str],
    cases: Mapping[str, CaseFiles],
    aliases: Mapping[str, str],
    patients: Mapping[str, str],
    fold: int,
    problems: Sequence[DataError],
) -> Layout:
    """Cases by split: from lists called after the splits where ``root`` has some, otherwise from a fold.

    ``endings`` are those of the lists, the preferred one first; the others see :func:`by_lists` and :func:`by_fold`.
    """
    lists: dict[Split, Path] = {
        split: path for split in SPLITS for end in reversed(endings) if (path := root / f"{split}{end}").is_file()
    }
    if lists:
        return Layout(by_lists(root, lists, cases, aliases, patients, fold), problems)
    return by_fold(root, cases, patients, fold, problems)


def by_fold(
    root: Path, cases: Mapping[str, CaseFiles], patients: Mapping[str, str], fold: int, problems: Sequence[DataError]
) -> Layout:
    """Cases by split, see :func:`fold_of`. Where cases lack files and no fold is sound, all others are for training.

    Nothing but a check then asks for them.
    """
    told: tuple[str, ...] = ()
    try:
        train, test, folds = fold_of(root, sorted(cases), patients, fold)
        made = f"from {SPLITS_FILE}" if (root / SPLITS_FILE).exists() else "divided as nnU-Net does"
        told = (f"test cases are those of fold {fold} (of 0 to {folds - 1}, {made}): data.fold=N is another one",)
    except DataError:
        if not problems:
            raise
        train, test = sorted(cases), []
    splits: dict[Split, dict[str, CaseFiles]] = {
        "train": {name: cases[name] for name in train},
        "test": {name: cases[name] for name in test},
    }
    return Layout(splits, problems, told)


def by_lists(
    root: Path,
    lists: Mapping[Split, Path],
    cases: Mapping[str, CaseFiles],
    aliases: Mapping[str, str],
    patients: Mapping[str, str],
    fold: int,
) -> dict[Split, dict[str, CaseFiles]]:
    """Cases by split from text files with one case per line.

    Args:
        root: Folder of the data.
        lists: The files.
        cases: Cases with all their files; one that is listed and not among them is left out, and told elsewhere.
        aliases: Words that a line may hold -> name of the case.
        patients: See :func:`fold_of`.
        fold: What the user gave for it; 0 if nothing.

    Raises:
        UsageError: There is a fold besides the lists.
        DataError: A list is missing or damaged, names unknown cases, or divides a case or a patient.
    """
    first = next(iter(lists.values()))
    if fold:
        raise UsageError(f"fold={fold}, but {root} has {first.name}", "leave fold out")
    for split in ("train", "test"):
        if split not in lists:
            raise DataError(f"{root} has {first.name} and no {split}{first.suffix}", "write one case name per line")
    listed = {split: _named(path, aliases) for split, path in lists.items()}
    for split in set(listed) - {"train"}:
        refuse_divided(str(lists[split]), listed["train"], listed[split], patients)
    return {split: {name: cases[name] for name in names if name in cases} for split, names in listed.items()}


def _named(path: Path, aliases: Mapping[str, str]) -> list[str]:
    """Cases of a list, sorted."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read: {error}", "write one case name per line") from error
    names: set[str] = set()
    for number, word in enumerate(map(str.strip, lines), 1):
        if not word:
            continue
        if word not in aliases:
            hint = nearest(word, aliases.values())
            raise DataError(f"{path} line {number} names the case '{word}', which is not there", hint)
        if aliases[word] in names:
            raise DataError(f"{path} line {number} lists '{aliases[word]}' a second time", "remove the line")
        names.add(aliases[word])
    if not names:
        raise DataError(f"the list {path} is empty", "write one case name per line")
    return sorted(names)


def fold_of(
    root: Path, names: Sequence[str], patients: Mapping[str, str], fold: int
) -> tuple[list[str], list[str], int]:
    """Training and test cases of a fold, and how many folds there are: nnU-Net's validation cases are the test cases.

    Folds are read from ``splits_final.json`` beside the data where it is, otherwise made as nnU-Net makes them, of the
    patients instead of the cases. Cases that the file does not list are left out, as by nnU-Net.

    Args:
        root: Folder of the data.
        names: All cases.
        patients: Patient of each case; of a case that is not listed the case itself.
        fold: From 0.

    Raises:
        UsageError: There is no such fold.
        DataError: There is one case or one patient only, or ``splits_final.json`` is damaged, names unknown cases, or
            divides a case or a patient.
    """
    path = root / SPLITS_FILE
    folds = _listed(path, names) if path.exists() else _made(root, names, patients)
    if not 0 <= fold < len(folds):
        raise UsageError(f"fold={fold}, but {root} has {len(folds)} folds", f"give 0 to {len(folds) - 1}")
    train, test = folds[fold]
    refuse_divided(f"fold {fold} of {path if path.exists() else root}", train, test, patients)
    return train, test, len(folds)


def refuse_divided(where: str, train: Sequence[str], test: Sequence[str], patients: Mapping[str, str]) -> None:
    """Raise DataError where a case or a patient is in training and in testing."""
    seen = {patients.get(name, name) for name in train}
    for name in test:
        if (patient := patients.get(name, name)) in seen:
            what = f"the case '{name}'" if patient == name else f"patient '{patient}' ('{name}')"
            raise DataError(f"{where}: {what} is in training and in testing", "move it to one of them")


def _made(root: Path, names: Sequence[str], patients: Mapping[str, str]) -> list[tuple[list[str], list[str]]]:
    from sklearn.model_selection import KFold  # half a second to import, and only needed here

    groups = sorted({patients.get(name, name) for name in names})
    if len(groups) < 2:
        what = "one patient only" if len(names) > 1 else "one case only" if names else "no case"
        raise DataError(f"{root} has {what}, which cannot be both for training and for testing", "add further cases")
    folds = []
    for _, chosen in KFold(min(FOLDS, len(groups)), shuffle=True, random_state=SEED).split(groups):
        held = {groups[k] for k in chosen}
        of_test = [patients.get(name, name) in held for name in names]
        folds.append(
            (
                [name for name, held_out in zip(names, of_test, strict=True) if not held_out],
                [name for name, held_out in zip(names, of_test, strict=True) if held_out],
            )
        )
    return folds


def _listed(path: Path, names: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise DataError(f"{path} is no list of folds", 'expected [{"train": [cases], "val": [cases]}, ...]')
    known = set(names)
    folds = []
    for number, fold in enumerate(content):
        parts = [fold.get(part) if isinstance(fold, dict) else None for part in ("train", "val")]
        for part in parts:
            if not isinstance(part, list) or not part or not all(isinstance(name, str) for name in part):
                raise DataError(f"{path}: fold {number} lacks cases", 'each fold is {"train": [cases], "val": [cases]}')
            if absent := next((name for name in part if name not in known), ""):
                what = f"{path}: fold {number} names the case '{absent}', which is not there"
                raise DataError(what, nearest(absent, known))
        train, test = parts
        folds.append((sorted(train or ()), sorted(test or ())))
    return folds
