"""Compute a recorded run of a study again and say whether it is the same, bit for bit.

As `table2.verify`, whose checks are used; here is what of a study there is to compare.
"""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from unitnorm.data import Dataset
from unitnorm.run.loop import Session
from unitnorm.run.records import Records
from unitnorm.study.experiment import recompute
from unitnorm.study.report import plan_of
from unitnorm.table2.verify import Check, compare, compare_hashes


def verify(
    known: Records, data: Dataset, chosen: pd.DataFrame, session: Session
) -> Iterator[Check]:
    """Train a recorded run again and compare; arguments as of `table2.verify.verify`."""
    row = {str(key): value for key, value in chosen.iloc[0].items()}
    yield compare_hashes("data", known.provenance["data"][row["dataset"]]["sha256"], data.sha256)
    again = recompute(plan_of(known), known["runs"], row, data, session)
    yield compare("runs", known, again, chosen)
