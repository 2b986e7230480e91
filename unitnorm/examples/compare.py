"""Does unit norm pay on the transformer? python -m unitnorm.examples.compare [FOLDER]

Four ways to train it, each tuned with seeds of their own, then compared on fresh ones. Predicted
before any run: with its rate and decay tuned, AdamW reaches un-adam, within 0.01 nats a letter;
without decay it stays behind; UN, whose steps know no second moment, does too. What was found,
and how the grids came about, stands in results/transformer.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from unitnorm.errors import Interrupted, UserError
from unitnorm.examples import transformer
from unitnorm.report.statistics import compare_pairs, summarise
from unitnorm.report.tables import Cells, format_columns, format_spread, to_csv, to_page
from unitnorm.run.config import ExperimentConfig, Section
from unitnorm.run.job import Loaded, TrainingOptions, open_job
from unitnorm.run.loop import Session
from unitnorm.run.planner import Found, Group, complete
from unitnorm.run.records import Records, Schema, Table, locked, read, write_files

SETTING = ["arm", "rate", "rest_rate", "decay"]
CELL = (*SETTING, "purpose", "seed")
COLUMNS = {"arm": "s", "rate": "d", "rest_rate": "d", "decay": "d", "purpose": "s", "seed": "i",
           "loss": "f"}  # fmt: skip
SCHEMA = Schema("transformer", {"runs": Table(COLUMNS, CELL)}, CELL)


class Arm(Section):
    """An update of the kernels, or AdamW of everything; the grid of its settings."""

    update: str
    rates: tuple[float, ...] = (0.0,)  # of the kernels; AdamW has one rate for all
    rest_rates: tuple[float, ...]
    decays: tuple[float, ...] = (0.0,)  # AdamW's


ARMS = {
    "adamw": Arm(
        update="adamw",
        rest_rates=(1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 3.2e-2, 4.8e-2,
                    6.4e-2),
    ),
    "adamw-decay": Arm(
        update="adamw", rest_rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2), decays=(0.03, 0.1, 0.3, 1.0)
    ),
    "un-adam": Arm(
        update="un-adam", rates=(2.4e-2, 4.8e-2, 9.6e-2), rest_rates=(1.6e-2, 3.2e-2, 6.4e-2),
        decays=(0.0, 0.1),
    ),
    "un": Arm(
        update="un", rates=(0.003, 0.01, 0.03, 0.1), rest_rates=(1.6e-2, 3.2e-2),
        decays=(0.0, 0.1),
    ),
}  # fmt: skip


class Comparison(ExperimentConfig):
    """The plan; seeds as (first, count)."""

    steps: int = 600
    tune: tuple[int, int] = (100, 3)
    compare: tuple[int, int] = (200, 20)
    arms: dict[str, Arm] = ARMS

    def conflict(self, recorded: Any) -> str | None:
        """Arms may get other grids; what is recorded stays and counts."""
        return super().conflict({**recorded, "arms": self.protocol()["arms"]})

    def settings(self) -> pd.DataFrame:
        """A row for each setting of each arm."""
        rows = [
            (name, *values)
            for name, arm in self.arms.items()
            for values in itertools.product(arm.rates, arm.rest_rates, arm.decays)
        ]
        return pd.DataFrame(rows, columns=SETTING)


def choose(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each arm the setting with the lowest mean loss over the tuning seeds."""
    means = runs[runs["purpose"] == "tune"].groupby(SETTING, as_index=False)["loss"].mean()
    return means.loc[means.groupby("arm")["loss"].idxmin()]


@dataclass(frozen=True)
class Transformers:
    """The experiment; see `planner.Experiment`. A group is a setting with its seeds."""

    plan: Comparison
    schema: Schema = SCHEMA

    def missing(self, records: Records) -> Iterator[Group]:
        """Tuning first, then the comparison of the settings that it chose."""
        lacking = list(self._lacking(records, "tune", self.plan.settings(), self.plan.tune))
        yield from lacking
        if not lacking:
            chosen = choose(records["runs"])[SETTING]
            yield from self._lacking(records, "compare", chosen, self.plan.compare)

    def _lacking(
        self, records: Records, purpose: str, settings: pd.DataFrame, seeds: tuple[int, int]
    ) -> Iterator[Group]:
        first, count = seeds
        for setting in settings.to_dict("records"):
            rows = [{**setting, "purpose": purpose, "seed": first + k} for k in range(count)]
            cells = pd.DataFrame(rows)
            cells = cells[~SCHEMA.among(cells, records["runs"])]
            if len(cells):
                yield Group(f"{purpose} {[*setting.values()]}", "runs", cells, setting)

    def compute(self, group: Group, data: None, session: Session) -> Found:
        """The losses of a group."""
        if session.interrupted():
            raise Interrupted
        arm, rate, rest_rate, decay = group.what.values()
        update, seeds = self.plan.arms[arm].update, group.cells["seed"].tolist()
        losses = transformer.train(seeds, update, rate, rest_rate, decay, self.plan.steps)
        session.say(f"{group.title}: {sum(losses) / len(losses):.4f} nats a letter")
        rows = group.cells.assign(loss=losses).to_dict("records")
        return Found({"runs": SCHEMA.frame("runs", rows)})


def report(runs: pd.DataFrame) -> dict[str, bytes]:
    """The tables of a folder: each arm at its chosen setting, and its difference to un-adam."""
    compared, chosen = runs[runs["purpose"] == "compare"], choose(runs)
    losses = compared.pivot(index="seed", columns="arm", values="loss")
    rows: list[dict[Any, Any]] = []
    for setting in chosen.to_dict("records"):
        mine = losses[setting["arm"]].to_numpy()
        difference, p, _ = compare_pairs(mine, losses["un-adam"].to_numpy())
        rows.append(
            {**setting, "n": len(mine), **summarise(mine)._asdict(), "difference": difference.mean,
             "difference_low": difference.ci_low, "difference_high": difference.ci_high, "p": p}
        )  # fmt: skip
    table = pd.DataFrame(rows).rename(columns={"loss": "tuning_loss"})
    difference_format = "{:+.4f} ({:+.4f} to {:+.4f})".format
    shown = {
        "arm": (str, "arm"),
        "rate": (lambda rate: f"{rate:g}" if rate else "", "rate"),
        "AdamW's rate": ("{:g}".format, "rest_rate"),
        "decay": ("{:g}".format, "decay"),
        "loss [nats]": (format_spread, "mean", "std"),
        "− un-adam": (
            lambda arm, *ends: "" if arm == "un-adam" else difference_format(*ends),
            "arm", "difference", "difference_low", "difference_high",
        ),
    }  # fmt: skip
    cells = Cells(
        "A character transformer, each way of training it at its best setting",
        format_columns(table, shown),
        f"Loss a letter on the last tenth of the text: mean ± standard deviation (ddof 1) of "
        f"{len(losses)} runs; the difference in pairs by seed with its 95 % interval.",
    )  # fmt: skip
    return {"summary.csv": to_csv(table).encode(), "summary.md": to_page([cells]).encode()}


def main(folder: str = "runs/transformer") -> None:
    """Train what is missing, then write the tables."""
    plan, out = Comparison(), Path(folder)
    count = len(plan.settings()) * plan.tune[1] + len(plan.arms) * plan.compare[1]
    with open_job(
        Transformers(plan), plan, lambda: Loaded({"": None}, {}, count), TrainingOptions(out)
    ) as job:
        complete(job)
    with locked(out):
        files = report(read(out, SCHEMA)["runs"])
        write_files(out, files)
    print(files["summary.md"].decode())


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Interrupted:
        sys.exit("interrupted; what is saved stays, and the same command goes on")
    except UserError as error:
        sys.exit(str(error))
