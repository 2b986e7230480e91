"""The planner and verification, with an experiment of squares: what is missing, once, and again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.cluster_example import SCHEMA, Squares
from unitnorm.errors import Interrupted, UserError
from unitnorm.run import verify
from unitnorm.run.loop import Session
from unitnorm.run.planner import Done, Found, add, complete
from unitnorm.run.records import Records

DATA = {"": list(range(10))}


def row(n: int, square: int) -> pd.DataFrame:
    return SCHEMA.frame("runs", [{"n": n, "square": square}])


@dataclass
class Backwards:
    """Two workers that compute what they were given last first."""

    given: list[Any] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    stop_at: int = 99

    def has_room(self) -> bool:
        return len(self.given) < 2

    def give(self, experiment, group, data) -> None:
        self.given.append((experiment, group, data))
        self.order.append(group.what)

    def next(self, session) -> list[Done]:
        if len(self.order) >= self.stop_at:
            raise Interrupted
        experiment, group, data = self.given.pop()
        session.grow(Found({"runs": row(9, len(self.order))}))
        return [Done(group, experiment.compute(group, data, session), "worker")]


def completed(experiment, engine=None, records=None) -> list[Records]:
    """All that was stored, until it was complete or interrupted."""
    kept: list[Records] = []
    job = SimpleNamespace(
        experiment=experiment, data=DATA, engine=engine, session=Session(),
        records=Records.empty(SCHEMA) if records is None else records,
        store=lambda records, done=(): kept.append(records),
    )  # fmt: skip
    try:
        complete(job)
    except Interrupted:
        assert len(engine.order) == engine.stop_at
    return kept


def squares(records: Records) -> dict[int, int]:
    return dict(records["runs"].itertuples(index=False, name=None))


def test_what_is_missing_is_computed_in_order_and_stored_as_it_comes():
    kept = completed(Squares(4))
    assert [squares(records) for records in kept] == [
        {n: n * n for n in range(count)} for count in range(1, 5)
    ]
    assert completed(Squares(4), records=kept[-1]) == []
    assert squares(completed(Squares(5), records=kept[2])[-1]) == {n: n * n for n in range(5)}


def test_an_engine_gets_each_group_once_while_it_has_room_and_records_grow():
    engine = Backwards()
    kept = completed(Squares(5), engine)
    assert sorted(engine.order) == list(range(5))
    assert engine.order[:3] == [0, 1, 2]  # two at first, and one as soon as one has ended
    assert squares(kept[0]) == {9: 2}  # before any group has ended
    assert {n: x for n, x in squares(kept[-1]).items() if n < 9} == {n: n * n for n in range(5)}


def test_an_interruption_keeps_what_has_ended():
    assert {1, 2} <= set(squares(completed(Squares(9), Backwards(stop_at=4))[-1]))


def test_several_groups_are_added_as_one():
    found = [
        Found({"runs": row(n, n * n)}, {f"{n}.txt": b"x"}, {"a.safetensors": {str(n): np.ones(n)}})
        for n in (1, 2)
    ]
    records = add(Records.empty(SCHEMA), *found)
    assert squares(records) == {1: 1, 2: 4}
    assert {"1.txt", "2.txt"} < set(records.files)
    assert sorted(records.arrays("a.safetensors")) == ["1", "2"]


def test_a_recorded_run_is_computed_again_and_told_from_an_altered_one():
    known = completed(Squares(5))[-1]
    chosen = verify.choose(known["runs"], n=3)
    (check,) = verify.verify(Squares(5), known, DATA[""], chosen, Session())
    assert check == ("runs.csv", True, "1 row with the same bits")
    altered = replace(known, tables={"runs": known["runs"].assign(square=[0, 1, 4, 10, 16])})
    (check,) = verify.verify(Squares(5), altered, DATA[""], chosen, Session())
    assert check == ("runs.csv", False, "1 of 1 row differ: square 10 there, 9 here")
    with pytest.raises(UserError, match="--n 7: no such run is recorded; there are 0, 1, 2"):
        verify.choose(known["runs"], n=7)


def test_a_column_that_came_later_is_not_compared_where_the_record_has_none():
    spec = replace(SCHEMA.tables["runs"], columns={"n": "i", "square": "i", "note": "s"},
                   later={"note": ""})  # fmt: skip
    schema = replace(SCHEMA, tables={"runs": spec})
    rows = [{"n": 1, "square": 1, "note": ""}]
    known = Records(schema, {"runs": schema.frame("runs", rows)})
    computed = schema.frame("runs", [{**rows[0], "note": "new"}])
    assert verify.compare("runs", known, computed, pd.DataFrame({"n": [1]})).matches
