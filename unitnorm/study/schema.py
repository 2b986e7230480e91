"""The table of a study's runs. A new factor is a column here, named in `FACTORS`, and filled in by
`experiment`."""

from unitnorm.run.records import Schema, Table

BUDGETS = (5, 10, 25)  # epochs after which the test images are measured, beside the end
MEASURED = ("train_loss", "val_error", "val_loss", "test_error", "test_loss")
# of a step at the end of an epoch, layer by layer, numbers with spaces between; see
# `archbn.evaluation.measure_step`
LAYERS = ("layer_rates", "layer_angles")
# What names a run. `start` and `spread` say from where, the rates are the base rates, `decay` is
# the weight decay of the filters.
_NAMES = {
    "dataset": "s", "network": "s", "depth": "i", "arm": "s", "purpose": "s", "seed": "i",
    "filters_rate": "f", "rest_rate": "f", "decay": "f", "start": "s", "spread": "f",
}  # fmt: skip
CELL = tuple(_NAMES)
FACTORS = ("start", "spread", "schedule", "batch_size", "reduction")  # may vary within an arm
_LAYERS_LATER = [f"{name}_{epoch}" for epoch in BUDGETS for name in LAYERS]
_RUNS = Table(
    {
        **_NAMES,
        "update": "s", "schedule": "s", "batch_size": "i", "reduction": "s",
        "epochs": "i", "stop_reason": "s", "diverged": "b",
        **dict.fromkeys(MEASURED, "f"),
        "effective_rate": "f",
        **{f"{name}_{epoch}": "f" for epoch in BUDGETS for name in MEASURED},
        "wrong": "s",  # the test images it gets wrong, packed; see `statistics.pack_wrong`
        **dict.fromkeys([*LAYERS, *_LAYERS_LATER], "s"),
    },
    CELL,
    packed=True,
    later={"network": "archbn", "decay": 0.0, **dict.fromkeys([*LAYERS, *_LAYERS_LATER], "")},
)  # fmt: skip
SCHEMA = Schema(kind="study", tables={"runs": _RUNS}, cell=CELL, files=r"plan\.toml")
