"""The commands `unitnorm segment …`: read options, call the package, print.

Everything heavy is imported inside the commands, so that --help stays quick.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from unitnorm.segment.config import SegmentConfig
    from unitnorm.segment.data import Scenes
    from unitnorm.segment.metrics import Metrics
    from unitnorm.segment.records import Records, Trained

OUT = Path("runs/segnet")
# a link to results/segnet/un.safetensors
PUBLISHED = Path(__file__).parents[1] / "segment" / "un.safetensors"
PHOTOS = Path("predictions")


@click.group()
def segment() -> None:
    """SegNet on CamVid: the paper's application of UN (section 5, figure 2).

    \b
    Example: invented road scenes, no data needed
      unitnorm segment train --synthetic --set train.epochs=10 --out look
      unitnorm segment report --synthetic --out look
    CamVid, more than an hour for each update on 2 CPU cores
      unitnorm segment train --config configs/segnet_cpu.toml --data-dir CamVid
    """


def _path(*names: str, default: Path | None = None, text: str, **options: Any) -> Any:
    return click.option(
        *names, type=click.Path(path_type=Path, **options), default=default,
        show_default=default is not None and not default.is_absolute(), help=text,
    )  # fmt: skip


def data_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the images come from."""
    command = click.option("--synthetic", is_flag=True, help="Invented scenes instead of CamVid.")(
        command
    )
    return click.option(
        "--data-dir", help="Folder of CamVid: train/, trainannot/, val/, valannot/ and so on."
    )(command)


def weights_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which trained network."""
    return _path(
        "--weights", default=PUBLISHED,
        text="File that train wrote.  [default: UN's at 90×120, which are part of unitnorm]",
    )(command)  # fmt: skip


def devices_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """How many devices share a mini-batch."""
    return click.option(
        "--devices",
        type=click.IntRange(1, 4096),
        help="CPU devices to share each mini-batch among.  [default: one per core, at most as "
        "many as divide the mini-batch]",
    )(command)


@segment.command()
@_path(
    "--config", "config_path",
    text="TOML file.  [default: that of configs/segnet_cpu.toml, which is built in]",
)  # fmt: skip
@_path("--out", default=OUT, text="Folder of the records and weights.", file_okay=False)
@click.option("--update", multiple=True, help="Update to train; may be repeated.")
@data_options
@click.option("--seed", type=int, help="Of the initial point and the order.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE",
    help="Override any key of the config, for example --set train.epochs=10.",
)  # fmt: skip
@click.option(
    "--resume/--fresh", default=True, show_default=True,
    help="Go on where an interrupted training stopped, or start the selected updates over.",
)  # fmt: skip
@click.option(
    "--checkpoint-every", type=click.FloatRange(0.0), default=60.0, show_default=True,
    metavar="SECONDS", help="Save the state at the end of an epoch, at most so often.",
)  # fmt: skip
@devices_option
def train(
    config_path: Path | None,
    out: Path,
    update: tuple[str, ...],
    data_dir: str | None,
    synthetic: bool,
    seed: int | None,
    overrides: tuple[str, ...],
    resume: bool,
    checkpoint_every: float,
    devices: int | None,
) -> None:
    """Train SegNet-Basic with each update; stop with Ctrl-C, go on by the same command.

    \b
    Example
      unitnorm segment train --config configs/segnet_cpu.toml --data-dir CamVid --update un
    """
    from unitnorm.run import config as base_config

    values = dict(base_config.parse_override(text) for text in overrides)
    given = {"updates": list(update) or None, "seed": seed}
    values |= {key: value for key, value in given.items() if value is not None}
    from unitnorm.run.job import interruptible, note

    started = time.time()
    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(interruptible())
        config = _config(config_path, values, data_dir, synthetic)
        _prepare(devices, config.train.batch_size)
        from unitnorm.run import records as base_records
        from unitnorm.run.checkpoints import Folder
        from unitnorm.run.loop import Interrupted
        from unitnorm.segment import data, experiment, records
        from unitnorm.segment.training import Program, Session, State

        console = _console()

        def say(text: str) -> None:
            console.print(text, highlight=False, soft_wrap=True)

        scenes = data.load_scenes(config.data)
        for name, count in data.COUNTS.items():
            found = len(scenes.splits[name].labels)
            if scenes.name == "camvid" and found != count:
                say(f"note: {found} images in {name}/; the whole of CamVid has {count}")
        stack.enter_context(base_records.locked(out))
        known = _matching(records.read(out), config, scenes, out, fresh=not resume)
        checkpoints = Folder(out / ".checkpoints", every_s=checkpoint_every, say=say)
        stack.callback(checkpoints.close)
        if not resume:
            checkpoints.drop(experiment.covered(name) for name in config.updates)
            if (out / records.PROVENANCE).exists():
                records.write(out, known)

        before = len(known.metrics)

        def store(now: Records) -> None:
            now.provenance = note(now.provenance, started, len(now.metrics) - before)
            records.write(out, now)
            checkpoints.drop(experiment.covered(name) for name in now.trained())

        status = stack.enter_context(console.status("compiling"))
        title = ""

        def epoch_done(program: Program, state: State, seconds: float) -> None:
            nonlocal title
            title = program.update
            say(_epoch_line(program, state, seconds))

        session = Session(
            epoch_done=epoch_done,
            step_done=lambda step, steps: status.update(f"{title} mini-batch {step}/{steps}"),
            say=say,
            checkpoints=checkpoints,
            interrupted=lambda: stopping.is_set,
        )
        stopping.after_the_epoch = True
        try:
            known = experiment.run(config, scenes, known, session, store)
        except Interrupted:
            raise KeyboardInterrupt from None
        status.stop()
        _print_table(console, known)


@segment.command()
@weights_option
@click.option(
    "--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True
)
@data_options
@devices_option
def evaluate(
    weights: Path, split: str, data_dir: str | None, synthetic: bool, devices: int | None
) -> None:
    """Measure trained weights on a split of CamVid.

    \b
    Example
      unitnorm segment evaluate --data-dir CamVid --weights results/segnet/un.safetensors
    """
    _prepare(devices, 8)
    from unitnorm.segment import records

    trained = records.unpack(weights)
    config, scenes = _scenes(trained, data_dir, synthetic)
    from unitnorm.segment.metrics import measure
    from unitnorm.segment.training import Program

    part = scenes.splits[split]
    program = Program(config, config.updates[0], part, part)
    metrics = measure(program.confusion(trained.weights, part))
    height, width = scenes.size
    console = _console()
    console.print(
        f"{trained.update} on {scenes.name} {split}, {len(part.labels)} images of {height}×{width}",
        highlight=False,
    )
    console.print(_metrics_table([(trained.update, metrics)]))


@segment.command()
@click.argument("images", nargs=-1, required=True, type=click.Path(path_type=Path))
@weights_option
@_path("--out", default=PHOTOS, text="Folder of the PNGs.", file_okay=False)
def predict(images: tuple[Path, ...], weights: Path, out: Path) -> None:
    """Segment photos of any size, and write PNGs.

    NAME_labels.png has the photo's size, the classes as its numbers and CamVid's colours as its
    palette; NAME_figure.png shows photo and prediction with a legend.

    \b
    Example
      unitnorm segment predict street.jpg
    """
    stems = [path.stem for path in images]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"{stem}: two images of this name; their predictions would collide")
    _prepare(1, 1)
    import io

    import numpy as np

    from unitnorm.report.style import encode
    from unitnorm.run import records as base_records
    from unitnorm.segment import figures, predicting, records

    trained = records.unpack(weights)
    predictor = predicting.predictor(trained)
    console = _console()
    for path in images:
        photo = predicting.open_photo(path)
        labels = predicting.segment_photo(predictor, photo, trained.size)
        content = io.BytesIO()
        predicting.label_image(labels).save(content, "PNG")
        photo.thumbnail((1600, 1600))  # more than a figure shows
        small = predicting.label_image(labels).resize(photo.size, 0)
        figure = figures.photo(np.asarray(photo), np.asarray(small))
        names = f"{path.stem}_labels.png", f"{path.stem}_figure.png"
        files = dict(zip(names, (content.getvalue(), encode(figure)["png"]), strict=True))
        with base_records.locked(out):  # makes the folder: not before there is something to keep
            base_records.write_files(out, files)
        console.print(
            f"{path}: {out / names[0]}, {out / names[1]}", highlight=False, soft_wrap=True
        )


@segment.command()
@_path("--out", default=OUT, text="Folder of the records.", file_okay=False)
@data_options
@click.option(
    "--images", "count", type=click.IntRange(1, 8), default=4, show_default=True,
    help="Test images in Figure 2.",
)  # fmt: skip
def report(out: Path, data_dir: str | None, synthetic: bool, count: int) -> None:
    """The table, the curves and, where the data is given, Figure 2, from the records.

    \b
    Example
      unitnorm segment report --data-dir CamVid
    """
    _prepare(1, 1)
    from unitnorm.report.style import encode
    from unitnorm.run import records as base_records
    from unitnorm.segment import figures, records

    console = _console()
    with base_records.locked(out, make=False):
        known = records.read(out)
        if known.metrics.empty:
            raise UserError(f"{out}: no records here; run `unitnorm segment train --out {out}`")
        files = {"table.md": records.markdown(known).encode()}
        drawn = {"curves": figures.curves(known.metrics, known.history)}
        if data_dir is not None or synthetic:
            drawn["figure2"] = _figure2(out, known, data_dir, synthetic, count)
        else:
            console.print("no Figure 2 without the images: give --data-dir", highlight=False)
        for name, figure in drawn.items():
            # pictures of pixels gain nothing as SVG
            endings = ["png"] if name == "figure2" else ["png", "svg"]
            encoded = encode(figure)
            files |= {f"figures/{name}.{ending}": encoded[ending] for ending in endings}
        base_records.write_files(out, files)
    _print_table(console, known)
    console.print(f"{', '.join(files)} in {out}", highlight=False, soft_wrap=True)


def _figure2(out: Path, known: Records, data_dir: str | None, synthetic: bool, count: int) -> Any:
    import numpy as np

    from unitnorm.report.style import label, sort_updates
    from unitnorm.segment import figures, predicting, records

    loaded = {u: records.unpack(out / f"{u}.safetensors") for u in sort_updates(known.weights)}
    _, scenes = _scenes(next(iter(loaded.values())), data_dir, synthetic)
    if scenes.sha256 != known.provenance["data"]["sha256"]:
        raise UserError(
            f"{data_dir or 'synthetic'}: not the images of these records; expected "
            f"{known.provenance['data']['name']} with SHA-256 "
            f"{known.provenance['data']['sha256'][:12]}…"
        )
    test = scenes.splits["test"]
    # evenly over the test set, whose images stand in the order of the drive
    chosen = np.linspace(0, len(test.labels), count, endpoint=False).astype(int)
    chosen = np.unique(chosen + len(test.labels) // (2 * count))
    predictions = {}
    for update, trained in loaded.items():
        predictor = predicting.predictor(trained)
        predictions[label(update)] = [
            predicting.labels_of(predictor, test.images[index]) for index in chosen
        ]
    return figures.samples(
        [test.images[index] for index in chosen],
        [test.labels[index] for index in chosen],
        predictions,
    )


# ---------------------------------------------------------------- shared


def _console() -> Console:
    from rich.console import Console

    return Console()


def _prepare(devices: int | None, batch_size: int) -> None:
    """Set up JAX: by default a CPU device per core, as many as divide a mini-batch."""
    import math
    import os

    from unitnorm.run import devices as device_setup

    if devices is None:
        devices = math.gcd(len(os.sched_getaffinity(0)), batch_size)
    device_setup.prepare(devices)


def _config(
    path: Path | None, values: dict[str, Any], data_dir: str | None, synthetic: bool
) -> SegmentConfig:
    from unitnorm.segment import config

    if data_dir is not None and synthetic:
        raise UserError("--data-dir and --synthetic: give one of them")
    if data_dir is not None:
        values["data.data_dir"] = data_dir
    if synthetic:
        values["data.dataset"] = "synthetic"
    return config.load(path, values)


def _scenes(
    trained: Trained, data_dir: str | None, synthetic: bool
) -> tuple[SegmentConfig, Scenes]:
    """The images at the size that the weights were trained on."""
    from unitnorm.segment import data

    height, width = trained.size
    values: dict[str, Any] = {"data.height": height, "data.width": width}
    values["network"] = trained.network.model_dump()
    config = _config(None, values, data_dir, synthetic)
    return config, data.load_scenes(config.data)


def _matching(
    known: Records, config: SegmentConfig, scenes: Scenes, out: Path, fresh: bool
) -> Records:
    """The folder's records, if they are of this config and data; else an error."""
    from unitnorm.segment import experiment

    expected = experiment.provenance(config, scenes)
    if fresh:
        known = known.dropped(config.updates)
    if known.metrics.empty:
        known.provenance = expected
    else:
        for key, what in (("config_sha256", "config"), ("data", "data set")):
            if known.provenance.get(key) != expected[key]:
                raise UserError(f"{out}: holds records of another {what}; give another --out")
    return known


def _epoch_line(program: Any, state: Any, seconds: float) -> str:
    import jax

    from unitnorm.run.progress import clock
    from unitnorm.segment.metrics import measure

    done = int(state.step) // program.steps
    history = jax.device_get(state.history)
    metrics = measure(history.confusion[done - 1])
    return (
        f"{program.update}: epoch {done}/{program.epochs}, loss {history.loss[done - 1]:.3f}, "
        f"val: global {metrics.global_accuracy:.1%}, class {metrics.class_accuracy:.1%}, "
        f"mean IoU {metrics.mean_iou:.1%}; {seconds:.1f} s, "
        f"{clock((program.epochs - done) * seconds)} left"
    )


def _print_table(console: Console, known: Records) -> None:
    from unitnorm.segment import records

    console.print(_metrics_table(list(records.headline(known))))


def _metrics_table(rows: list[tuple[str, Metrics]]) -> Any:
    from rich.table import Table

    from unitnorm.segment.palette import NAMES

    table = Table("%", *(name for name, _ in rows), box=None)
    for index, title in enumerate(("global accuracy", "class average", "mean IoU")):
        table.add_row(title, *(f"{100 * metrics[index]:.1f}" for _, metrics in rows))
    for index, name in enumerate(NAMES):
        table.add_row(f"IoU {name}", *(f"{100 * metrics.iou[index]:.1f}" for _, metrics in rows))
    return table
