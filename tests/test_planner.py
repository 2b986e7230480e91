"""The planner, with an experiment of squares: what is missing, once; and what verification says."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.cluster_example import SCHEMA, Kept, Squares
from unitnorm.errors import Interrupted, UserError
from unitnorm.run import verify
from unitnorm.run.planner import Done, Found, add
from unitnorm.run.records import Records


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


def squares(runs: pd.DataFrame) -> dict[int, int]:
    return dict(runs.itertuples(index=False, name=None))


def test_what_is_missing_is_computed_in_order_and_stored_as_it_comes():
    kept = Kept(Squares(4))
    kept.complete()
    assert [squares(records["runs"]) for records in kept.stored] == [
        {n: n * n for n in range(count)} for count in range(1, 5)
    ]
    more = Kept(Squares(5), known=kept.stored[-1])
    assert squares(more.complete()) == {n: n * n for n in range(5)}
    assert len(more.stored) == 1


def test_an_engine_gets_each_group_once_while_it_has_room_and_records_grow():
    engine, kept = Backwards(), Kept(Squares(5))
    found = squares(kept.complete(engine))
    assert sorted(engine.order) == list(range(5))
    assert engine.order[:3] == [0, 1, 2]  # two at first, and one as soon as one has ended
    assert squares(kept.stored[0]["runs"]) == {9: 2}  # before any group has ended
    assert {n: x for n, x in found.items() if n < 9} == {n: n * n for n in range(5)}


def test_an_interruption_keeps_what_has_ended():
    kept = Kept(Squares(9))
    with pytest.raises(Interrupted):
        kept.complete(Backwards(stop_at=4))
    assert {1, 2} <= set(squares(kept.stored[-1]["runs"]))


def test_a_group_that_gives_other_runs_than_its_own_ends_the_work():
    """Its runs would stay missing, and be computed again without end."""

    class Others(Squares):
        def compute(self, group, data, session):
            return Found({"runs": row(group.what + 100, 0)})

    with pytest.raises(RuntimeError, match="square 0: what was computed are other runs"):
        Kept(Others(2)).complete()


def test_several_groups_are_added_as_one():
    found = [
        Found({"runs": row(n, n * n)}, {f"{n}.txt": b"x"}, {"a.safetensors": {str(n): np.ones(n)}})
        for n in (1, 2)
    ]
    records = add(Records.empty(SCHEMA), *found)
    assert squares(records["runs"]) == {1: 1, 2: 4}
    assert {"1.txt", "2.txt"} < set(records.files)
    assert sorted(records.arrays("a.safetensors")) == ["1", "2"]


def test_a_run_that_is_not_recorded_cannot_be_verified():
    with pytest.raises(UserError, match="--n 7: no such run is recorded; there are 0, 1, 2"):
        verify.choose(Kept(Squares(3)).complete(), n=7)


def test_a_column_that_came_later_is_not_compared_where_the_record_has_none():
    spec = replace(SCHEMA.tables["runs"], columns={"n": "i", "square": "i", "note": "s"},
                   later={"note": ""})  # fmt: skip
    schema = replace(SCHEMA, tables={"runs": spec})
    rows = [{"n": 1, "square": 1, "note": ""}]
    known = Records(schema, {"runs": schema.frame("runs", rows)})
    computed, chosen = schema.frame("runs", [{**rows[0], "note": "new"}]), pd.DataFrame({"n": [1]})
    assert verify.compare("runs", known, computed, chosen).matches
    altered = known.with_rows("runs", schema.frame("runs", [{**rows[0], "square": 7}]))
    found = verify.compare("runs", altered, computed, chosen).found
    assert found == "1 of 1 row differ: square 7 there, 1 here"
