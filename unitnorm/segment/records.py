"""The files of a segmentation's results folder: metrics.csv, weights, provenance.json.

`metrics.csv` has a row per update, split and epoch: val after each epoch, test for the best epoch
(by mean IoU on val) and the last. `UPDATE.safetensors` holds an update's best weights. Both are
named in `provenance.json` with their SHA-256. To add a column, add it here.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors
import safetensors.numpy

from unitnorm.errors import UserError
from unitnorm.report.style import label, sort_updates
from unitnorm.run import records as base
from unitnorm.segment.config import Network
from unitnorm.segment.metrics import Metrics
from unitnorm.segment.palette import CLASSES, NAMES
from unitnorm.segment.training import Weights

FORMAT = 1  # of provenance.json and the weights; raised when an older reader would misread them
METRICS, CURVES, PROVENANCE = "metrics.csv", "history.csv", "provenance.json"
COLUMNS = (
    "update", "height", "width", "split", "epoch", "global_accuracy", "class_accuracy", "mean_iou",
    *NAMES,
)  # fmt: skip
HISTORY = ("update", "epoch", "learning_rate", "loss", "norm_deviation")
_DTYPES = {
    "update": "object",
    "split": "object",
    "height": "int64",
    "width": "int64",
    "epoch": "int64",
}


@dataclass
class Records:
    """What a results folder holds.

    Attributes:
      metrics: with `COLUMNS`; the last eleven are the IoU per class, NaN where undefined.
      history: with `HISTORY`: training loss and max |‖w‖ − 1| after each epoch.
      weights: update → safetensors bytes, as `pack` makes them.
      provenance: config, data, commands; `{}` before the first write.
    """

    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(COLUMNS)))
    history: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(HISTORY)))
    weights: dict[str, bytes] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def trained(self) -> list[str]:
        """The updates whose training is complete: those with rows of test."""
        test = self.metrics[self.metrics["split"] == "test"]
        return list(dict.fromkeys(test["update"]))

    def replaced(self, update: str, metrics: pd.DataFrame, history: pd.DataFrame) -> Records:
        """With these rows in place of all that are recorded of the update."""
        without = self.dropped([update])
        return Records(
            _joined(without.metrics, metrics), _joined(without.history, history),
            without.weights, self.provenance,
        )  # fmt: skip

    def dropped(self, updates: list[str]) -> Records:
        """Without these updates."""
        return Records(
            self.metrics[~self.metrics["update"].isin(updates)].reset_index(drop=True),
            self.history[~self.history["update"].isin(updates)].reset_index(drop=True),
            {name: content for name, content in self.weights.items() if name not in updates},
            self.provenance,
        )


def row(
    update: str, size: tuple[int, int], split: str, epoch: int, metrics: Metrics
) -> dict[str, Any]:
    """A row of metrics.csv."""
    head = (update, *size, split, epoch, *metrics[:3], *metrics.iou)
    return dict(zip(COLUMNS, head, strict=True))


def read(folder: Path) -> Records:
    """The records of a folder, checked against their hashes; empty ones if there are none.

    Raises:
      UserError: a file is missing, altered or of another format.
    """
    path = folder / PROVENANCE
    if not path.exists():
        if (folder / METRICS).exists():
            raise UserError(f"{path}: missing beside {METRICS}; {base.REPAIR}")
        return Records()
    try:
        provenance = json.loads(path.read_bytes())
        if provenance["format"] != FORMAT or provenance["kind"] != "segmentation":
            raise KeyError("format")
        hashes, _ = provenance["files"], provenance["config_sha256"]
        contents = {name: (folder / name).read_bytes() for name in hashes}
        if not {METRICS, CURVES} <= set(hashes):
            raise KeyError("files")
    except OSError as problem:
        raise UserError(
            f"{problem.filename}: cannot be read ({problem.strerror}); {base.REPAIR}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: not the provenance of a segmentation's results (format {FORMAT}); "
            f"{base.REPAIR}"
        ) from None
    for name, content in contents.items():
        found = hashlib.sha256(content).hexdigest()
        if found != hashes[name]:
            raise UserError(
                f"{folder / name}: altered or cut: expected SHA-256 {hashes[name][:12]}… from "
                f"{PROVENANCE}, found {found[:12]}…; {base.REPAIR}"
            )
    suffix = ".safetensors"
    return Records(
        _parse(folder / METRICS, contents[METRICS], COLUMNS),
        _parse(folder / CURVES, contents[CURVES], HISTORY),
        {n.removesuffix(suffix): contents[n] for n in contents if n.endswith(suffix)},
        provenance,
    )


def write(folder: Path, records: Records, extra: Mapping[str, bytes] | None = None) -> None:
    """Replace a folder's records as a whole; call inside `unitnorm.run.records.locked`.

    Raises:
      UserError: as `unitnorm.run.records.write_files`.
    """
    files = {
        METRICS: records.metrics.to_csv(index=False, lineterminator="\n").encode(),
        CURVES: records.history.to_csv(index=False, lineterminator="\n").encode(),
        **{f"{name}.safetensors": content for name, content in records.weights.items()},
    }
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    records.provenance = {
        "format": FORMAT, "kind": "segmentation", **records.provenance, "files": hashes
    }  # fmt: skip
    text = json.dumps(records.provenance, indent=2, ensure_ascii=False) + "\n"
    base.write_files(folder, files | {PROVENANCE: text.encode()} | dict(extra or {}))


def pack(weights: Weights, network: Network, update: str, size: tuple[int, int]) -> bytes:
    """Weights as safetensors, with what is needed to build the network and to use it."""
    about = {
        "format": str(FORMAT), "network": network.model_dump_json(), "update": update,
        "height": str(size[0]), "width": str(size[1]), "classes": " ".join(NAMES),
    }  # fmt: skip
    return safetensors.numpy.save(
        {name: np.asarray(x) for name, x in _named(weights).items()}, about
    )


@dataclass(frozen=True)
class Trained:
    """A network with its weights, and the size of image that it was trained on."""

    network: Network
    weights: Weights
    update: str
    size: tuple[int, int]


def unpack(path: Path) -> Trained:
    """The weights in a file that `pack` made.

    Raises:
      UserError: it is missing, damaged, or something else.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there are no weights; give a file with --weights, or train first: "
            "unitnorm segment train"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != str(FORMAT) or about["classes"] != " ".join(NAMES):
            raise KeyError("format")
        network = Network.model_validate_json(about["network"])
        weights = _nested(tensors, network)
        size = int(about["height"]), int(about["width"])
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as problem:
        reason = " ".join(f"{type(problem).__name__}: {problem}".split())[:160]
        raise UserError(
            f"{path}: not the weights of a SegNet of this version ({reason}); expected a file "
            "that `unitnorm segment train` wrote"
        ) from None
    return Trained(network, weights, about["update"], size)


def _nested(tensors: dict[str, np.ndarray], network: Network) -> Weights:
    """Tensors in the places that the network has for them."""
    import jax

    from unitnorm.segment.model import segnet

    like = Weights(*jax.eval_shape(segnet(network, CLASSES).init, jax.random.key(0)))
    wanted = _named(like)
    if {n: x.shape for n, x in tensors.items()} != {n: x.shape for n, x in wanted.items()}:
        raise ValueError("the tensors do not fit the network")
    return jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in wanted])


def _named(weights: Weights) -> dict[str, Any]:
    """The leaves by their path, such as params/encoders/0/conv/kernel, in the order of the tree."""
    import jax

    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }


def _joined(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([old, new], ignore_index=True) if len(old) else new.reset_index(drop=True)


def _parse(path: Path, content: bytes, columns: tuple[str, ...]) -> pd.DataFrame:
    try:
        table = pd.read_csv(
            io.BytesIO(content), dtype={c: _DTYPES.get(c, "float64") for c in columns}
        )
    except (ValueError, OverflowError) as problem:
        detail = " ".join(str(problem).split())
        raise UserError(f"{path}: not a table of records: {detail}; {base.REPAIR}") from None
    if tuple(table.columns) != columns:
        raise UserError(
            f"{path}: columns {','.join(map(str, table.columns))}; expected {','.join(columns)}; "
            f"{base.REPAIR}"
        )
    return table


# ---------------------------------------------------------------- what is shown of them


def headline(known: Records) -> list[tuple[str, Metrics]]:
    """Per update the test results of its best epoch on val; val's so far where there are none."""
    result = []
    for update in sort_updates(known.metrics["update"]):
        rows = known.metrics[known.metrics["update"] == update]
        val, test = (rows[rows["split"] == split] for split in ("val", "test"))
        best = val.iloc[int(val["mean_iou"].fillna(-1.0).to_numpy().argmax())]
        chosen = test[test["epoch"] == best["epoch"]]
        split, line = ("test", chosen.iloc[0]) if len(chosen) else ("val", best)
        iou = line[list(NAMES)].to_numpy(float)
        overall, per_class, mean_iou = (float(line[name]) for name in COLUMNS[5:8])
        title = f"{label(update)}, {split}, epoch {line['epoch']}"
        result.append((title, Metrics(overall, per_class, mean_iou, iou)))
    return result


def markdown(known: Records) -> str:
    """`headline` as a table, in percent."""
    about = known.provenance["data"]
    lines = [
        f"SegNet-Basic on {about['name']}, images of {about['height']}×{about['width']}, in %. "
        "The epoch is that with the highest mean IoU on val.",
        "",
        "| | global accuracy | class average | mean IoU | " + " | ".join(NAMES) + " |",
        "| --- |" + " ---: |" * (3 + CLASSES),
    ]
    for title, metrics in headline(known):
        values = [*metrics[:3], *metrics.iou]
        lines.append(f"| {title} | " + " | ".join(f"{100 * x:.1f}" for x in values) + " |")
    return "\n".join(lines) + "\n"
