"""The records as the report takes them: columns, checks, order and names.

The frames come from `runs.csv`, `history.csv` and `sweep.csv` (a row per run; per run and epoch;
per run and rate). What is checked here is what the report itself relies on, so that a damaged
record ends in one clear line and never in a wrong figure. Which columns there are is said in
`unitnorm.run.records`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import numpy as np
import pandas as pd

from unitnorm.errors import UserError
from unitnorm.table2.schema import SCHEMA

RUNS, HISTORY, SWEEP = (dict(SCHEMA.tables[n].columns) for n in ("runs", "history", "sweep"))

BASELINE = "b-sgd"  # the update that the others are compared with
FAILED_REASONS = ("diverged", "non-finite", "no-rate")

_KINDS = {"i": "whole numbers", "f": "numbers", "b": "true or false", "s": "text"}
_LABELS = {"b-sgd": "B-SGD", "un": "UN"}  # as the paper prints them


def label(update: str) -> str:
    """The name of an update in tables and figures: the paper's where it has one, on one line."""
    return _LABELS.get(update, re.sub(r"\s+", " ", update))


def in_order(updates: Iterable[str]) -> list[str]:
    """Each update once: the baseline first, UN next, the others by name."""
    return sorted(set(updates), key=lambda name: (name != BASELINE, name != "un", name))


def by_update(frame: pd.DataFrame) -> Iterator[tuple[int, str, pd.DataFrame]]:
    """Depth, update and their rows, in the order of the frame."""
    for key, group in frame.groupby(["depth", "update"], sort=False):
        depth, update = cast(tuple[int, str], key)
        yield int(depth), update, group


def checked_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs in the report's order, with a truth value `failed` (left out of every mean).

    A run has failed where it is marked as diverged or stopped for a non-finite or diverged loss.

    Raises:
        UserError: the frame is empty or damaged, a run stands twice, or a run that has not failed
            has an error outside 0 to 1.
    """
    runs = _checked(runs, "runs.csv", RUNS, unique=["depth", "update", "run"])
    runs["failed"] = runs["diverged"].astype(bool) | runs["stop_reason"].isin(FAILED_REASONS)
    for column in ("val_error", "test_error"):
        wrong = runs[~runs["failed"] & ~runs[column].between(0, 1)]
        if len(wrong):
            row = wrong.iloc[0]
            raise UserError(
                f"runs.csv: {column} of depth {row['depth']}, {row['update']}, run {row['run']} is "
                f"{row[column]:g}; expected a fraction from 0 to 1 for a run that has not "
                "diverged; train this run again"
            )
    return _sorted(runs, "run")


def checked_history(history: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The history of the given (checked) runs, in the report's order, with their `failed`.

    Raises:
        UserError: the frame is empty or damaged, a run has no history or a gap in it, or a value
            to be drawn of a run that has not failed is not finite.
    """
    keys = ["depth", "update", "run"]
    history = _checked(history, "history.csv", HISTORY, unique=[*keys, "epoch"])
    history = runs[[*keys, "failed"]].merge(history, on=keys, how="left")
    epochs = history.groupby(keys, sort=False)["epoch"].agg(["min", "max", "count"]).reset_index()
    gaps = epochs[(epochs["min"] != 1) | (epochs["max"] != epochs["count"])]
    if len(gaps):
        row = gaps.iloc[0]
        found = f"{row['count']} epochs, the last {row['max']:g}" if row["count"] else "none"
        raise UserError(
            f"history.csv: depth {row['depth']}, {row['update']}, run {row['run']} needs a row for "
            f"each epoch from 1, found {found}; restore the records or train again"
        )
    drawn = ["lr", "train_loss", "val_error"]
    finite = np.isfinite(history[drawn].to_numpy(float)).all(axis=1)
    wrong = history[~history["failed"] & ~finite]
    if len(wrong):
        row = wrong.iloc[0]
        raise UserError(
            f"history.csv: depth {row['depth']}, {row['update']}, run {row['run']}, epoch "
            f"{row['epoch']:g} holds a value that is not finite, but runs.csv does not call the "
            "run diverged; restore the records or train again"
        )
    return _sorted(history.astype({"epoch": int}), "run", "epoch")


def checked_sweep(sweep: pd.DataFrame) -> pd.DataFrame:
    """The sweep in the report's order.

    Raises:
        UserError: the frame is empty or damaged, or a run and rate stand twice.
    """
    sweep = _checked(sweep, "sweep.csv", SWEEP, unique=["depth", "update", "run", "base_lr"])
    return _sorted(sweep, "run", "base_lr")


def _checked(
    frame: pd.DataFrame, name: str, columns: Mapping[str, str], unique: list[str]
) -> pd.DataFrame:
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise UserError(
            f"{name}: no column {', '.join(missing)}; expected {', '.join(columns)}; "
            "restore the records or train again"
        )
    if frame.empty:
        raise UserError(f"{name} holds no rows; run `unitnorm train` before `unitnorm report`")
    frame = frame[list(columns)].copy()
    for column, kind in columns.items():
        if not _is_kind(frame[column], kind):
            raise UserError(
                f"{name}: column {column} does not hold {_KINDS[kind]} alone; "
                "restore the records or train again"
            )
    twice = frame[frame.duplicated(unique)]
    if len(twice):
        row = ", ".join(f"{column} {twice.iloc[0][column]}" for column in unique)
        raise UserError(f"{name}: {row} stands there twice; restore the records or train again")
    return frame


def _is_kind(values: pd.Series, kind: str) -> bool:
    if kind == "s":
        return bool(values.map(lambda value: isinstance(value, str) and value != "").all())
    if kind == "b":
        return pd.api.types.is_bool_dtype(values) and not values.isna().any()
    if pd.api.types.is_bool_dtype(values) or not pd.api.types.is_numeric_dtype(values):
        return False
    # NaN and infinity are allowed in measurements: that is how a diverged run is recorded.
    return kind == "f" or bool((np.isfinite(values) & (values % 1 == 0)).all())


def _sorted(frame: pd.DataFrame, *then: str) -> pd.DataFrame:
    rank = {update: place for place, update in enumerate(in_order(frame["update"]))}
    frame = frame.assign(_rank=frame["update"].map(rank))
    return frame.sort_values(["depth", "_rank", *then], ignore_index=True).drop(columns="_rank")
