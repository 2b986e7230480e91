"""The commands `unitnorm segment …`: read options, call the package, print.

Everything heavy is imported inside the commands, so that --help stays quick.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError
from unitnorm.run.job import Job, open_job

if TYPE_CHECKING:
    from unitnorm.run.records import Records
    from unitnorm.segment.config import SegmentConfig
    from unitnorm.segment.data import SceneData
    from unitnorm.segment.weights import TrainedSegNet

OUT = "runs/segnet"
# a link to results/segnet/renewed/un.safetensors
PUBLISHED = Path(__file__).parents[1] / "segment" / "un.safetensors"


@click.group(short_help="SegNet on CamVid: train, measure, predict.")
def segment() -> None:
    """SegNet on CamVid: the paper's application of UN (section 5, figure 2).

    \b
    Example: invented road scenes, no data needed
      unitnorm segment train --synthetic --set train.epochs=10 --out runs/look
      unitnorm segment report --synthetic --out runs/look
    CamVid, hours for each update on 2 CPU cores
      unitnorm segment train --config segnet --data-dir CamVid
    """


scene_options = opt.together(
    opt.option("--data-dir", "data__data_dir", group=opt.DATA,
               help="Folder of CamVid: train/, trainannot/, val/ …"),
    opt.option("--synthetic", "data__dataset", group=opt.DATA, flag_value="synthetic",
               help="Invented scenes instead of CamVid."),
)  # fmt: skip


def weights_option(*, multiple: bool = False) -> opt.Decorator:
    """--weights, once or several times."""
    return opt.option(
        "--weights", group=opt.RECORDS, type=click.Path(path_type=Path), multiple=multiple,
        default=[PUBLISHED] if multiple else PUBLISHED,
        help=f"File that train wrote{'; may be repeated' if multiple else ''}.  [default: UN's, "
        "which are part of unitnorm]",
    )  # fmt: skip


training_options = opt.together(
    opt.config_option("segnet_small"),
    opt.update_option,
    opt.runs_option,
    opt.seed_option,
    scene_options,
    opt.training_options(OUT),
)


@segment.command(cls=opt.GroupedCommand, short_help="Choose each update's learning rate.")
@training_options
@opt.option("--rate", "sweep__rates", group=opt.SELECTION, type=float, multiple=True,
            help="Rate to try; may be repeated.  [default: the config's]")  # fmt: skip
def sweep(**options: Any) -> None:
    """Choose each update's base learning rate on a sequence of training images held out.

    \b
    Example
      unitnorm segment sweep --config segnet --data-dir CamVid --rate 0.3 --rate 1
    """
    with open_segmentation(options) as (config, job):
        do_sweep(config, job)
        _print_tables(job.records)


@segment.command(cls=opt.GroupedCommand, short_help="Train SegNet-Basic with each update.")
@training_options
def train(**options: Any) -> None:
    """Train SegNet-Basic with each update; stop with Ctrl-C, go on by the same command.

    An update without a learning rate in the config is swept first.

    \b
    Example
      unitnorm segment train --config segnet --data-dir CamVid --update un
    """
    from unitnorm.segment import experiment

    with open_segmentation(options) as (config, job):
        if not experiment.list_missing(experiment.list_cells(config), job.records["runs"]):
            job.session.say("train: every selected run is recorded; --fresh starts over")
        unswept = experiment.find_unswept(config, job.records)
        if unswept:
            job.session.say(f"train: {', '.join(unswept)}: no learning rate yet, sweeping first")
            do_sweep(config.model_copy(update={"updates": unswept}), job)
        experiment.train_missing(config, job.data, job.records, job.session, job.store)
        _print_tables(job.records)


@segment.command(cls=opt.GroupedCommand, short_help="Measure trained weights on a split.")
@weights_option(multiple=True)
@opt.option("--save", group=opt.RECORDS, type=click.Path(path_type=Path, dir_okay=False),
            help="Markdown file to write the table to, too.")  # fmt: skip
@opt.option("--split", group=opt.DATA, type=click.Choice(["train", "val", "test"]),
            default="test", show_default=True, help="Which images.")  # fmt: skip
@scene_options
def evaluate(weights: tuple[Path, ...], save: Path | None, split: str, **scene_choice: Any) -> None:
    """Measure trained weights on a split of CamVid; one file by sequence, too.

    \b
    Example
      unitnorm segment evaluate --data-dir CamVid --weights un.safetensors
    """
    from unitnorm.run import devices

    devices.prepare()
    import numpy as np
    from rich.console import Console

    from unitnorm.report.tables import Fitting, to_markdown
    from unitnorm.run import records
    from unitnorm.segment import tables
    from unitnorm.segment.evaluation import Evaluator
    from unitnorm.segment.metrics import measure
    from unitnorm.segment.weights import read_weights

    loaded = {path: read_weights(path) for path in weights}
    if len({trained.size for trained in loaded.values()}) > 1:
        raise UserError("--weights: trained on images of different sizes; measure them one by one")
    data = _scenes_for(next(iter(loaded.values())), **scene_choice)
    scenes, (height, width) = data.splits[split], data.size
    names = [trained.update for trained in loaded.values()]
    drives = np.unique(scenes.sequences)
    if len(loaded) > 1:
        names = [f"{path.parent.name}/{path.stem}" for path in loaded]
        if len(set(names)) < len(names):
            names = [str(path) for path in loaded]
    columns = {}
    for name, trained in zip(names, loaded.values(), strict=True):
        matrices = Evaluator(trained.network).confusion(trained.weights, scenes)
        columns[name] = measure(matrices.sum(0))
        for drive in drives if len(loaded) == 1 < len(drives) else ():
            columns[str(drive)] = measure(matrices[scenes.sequences == drive].sum(0))
    title = f"{data.name} {split}, {len(scenes.labels)} images of {height}×{width}"
    table = tables.tabulate(title, columns)
    if save is not None:
        with records.locked(save.parent):
            records.write_files(save.parent, {save.name: to_markdown(table).encode() + b"\n"})
    Console().print(Fitting(table))


@segment.command(cls=opt.GroupedCommand, short_help="Average batch statistics anew.")
@opt.config_option("segnet_small")
@weights_option()
@scene_options
@opt.option("--out", group=opt.RECORDS, type=click.Path(path_type=Path, dir_okay=False),
            default=Path("runs/renewed.safetensors"), show_default=True,
            help="File to write.")  # fmt: skip
def renew(
    config_path: str | None,
    overrides: tuple[str, ...],
    weights: Path,
    out: Path,
    **scene_choice: Any,
) -> None:
    """Average the batch statistics of trained weights anew, as the config's train.statistics says.

    Over the training images of the data given, at the size that the weights were trained for.

    \b
    Example
      unitnorm segment renew --config segnet --data-dir CamVid
    """
    from unitnorm.run import devices

    devices.prepare(1)
    from unitnorm.run import records
    from unitnorm.segment.training import SegNetProgram
    from unitnorm.segment.weights import pack_weights, read_weights

    config = _read_config(config_path, overrides, **scene_choice)
    if config.train.statistics == "running":
        raise UserError(
            'train.statistics = "running": nothing to average; expected "batches", "anew"'
        )
    trained = read_weights(weights)
    data = _scenes_for(trained, **scene_choice)
    program = SegNetProgram(
        "renew", config.model_copy(update={"network": trained.network}), trained.update,
        config.seed, 1.0, [1.0], data.splits["train"], data.splits["val"],
    )  # fmt: skip
    found = program.renewed(trained.weights, 1)
    packed = pack_weights(found, trained.network, trained.update, trained.size)
    with records.locked(out.parent):
        records.write_files(out.parent, {out.name: packed})
    click.echo(f"{weights}: statistics of {len(data.splits['train'].labels)} images in {out}")


@segment.command(cls=opt.GroupedCommand, short_help="Segment photos.")
@opt.argument("images", "Photos.", nargs=-1, required=True, type=click.Path(path_type=Path))
@weights_option()
@opt.option("--overlay", is_flag=True, help="NAME_overlay.png too: the photo under the colours.")
@opt.out_option("runs/predictions", "Folder of the PNGs.")
def predict(images: tuple[Path, ...], weights: Path, overlay: bool, out: Path) -> None:
    """Segment photos of any size, and write PNGs.

    NAME_labels.png has the photo's size, the classes as its numbers and CamVid's colours as its
    palette; NAME_figure.png shows photo and prediction with a legend. The classes' shares of the
    photo are printed.

    \b
    Example
      unitnorm segment predict street.jpg --overlay
    """
    stems = [path.stem for path in images]
    for stem in stems:
        if stems.count(stem) > 1:
            raise UserError(f"{stem}: two images of this name; their predictions would collide")
    from unitnorm.run import devices

    devices.prepare(1)
    import numpy as np

    from unitnorm.report.style import encode
    from unitnorm.run import records
    from unitnorm.segment import pictures, predicting
    from unitnorm.segment.weights import read_weights

    trained = read_weights(weights)
    predictor = predicting.make_predictor(trained)
    for path in images:
        photo = predicting.open_photo(path)
        labels = predicting.segment_photo(predictor, photo, trained.size)
        drawn = predicting.draw_labels(labels)
        files = {f"{path.stem}_labels.png": predicting.to_png(drawn)}
        if overlay:
            over = predicting.draw_overlay(photo, labels)
            files[f"{path.stem}_overlay.png"] = predicting.to_png(over)
        photo.thumbnail((1600, 1600))  # more than a figure shows
        small = np.asarray(drawn.resize(photo.size, 0))
        figure = pictures.draw_photo(np.asarray(photo), small)
        files[f"{path.stem}_figure.png"] = encode(figure)["png"]
        with records.locked(out):  # makes the folder: not before there is something to keep
            records.write_files(out, files)
        click.echo(f"{path}: {predicting.describe_shares(labels)}")
        click.echo(f"  {', '.join(files)} in {out}{os.sep}")


@segment.command(cls=opt.GroupedCommand, short_help="Tables and figures, from the records.")
@opt.out_option(OUT)
@scene_options
@opt.option("--images", "count", type=click.IntRange(1, 8), default=4, show_default=True,
            help="Test images in Figure 2.")  # fmt: skip
def report(out: Path, count: int, **scene_choice: Any) -> None:
    """The tables, the curves and, where the data is given, Figure 2, from the records.

    \b
    Example
      unitnorm segment report --data-dir CamVid
    """
    from unitnorm.run import devices

    devices.prepare(1)
    from unitnorm.report.style import encode
    from unitnorm.report.tables import to_markdown
    from unitnorm.run import records
    from unitnorm.segment import pictures, tables
    from unitnorm.segment.schema import SCHEMA

    with records.locked(out, make=False):
        known = records.read(out, SCHEMA)
        if known.is_empty():
            raise UserError(f"{out}: no records here; run `unitnorm segment train --out {out}`")
        shown = tables.list_tables(known)
        files = {"table.md": "\n\n".join(to_markdown(c) for c in shown).encode() + b"\n"}
        if not known["history"].empty:
            drawn = encode(pictures.draw_curves(known["metrics"], known["history"]))
            files |= {f"figures/curves.{ending}": drawn[ending] for ending in ("png", "svg")}
        if any(scene_choice.values()) and known.files:
            figure = _draw_figure2(out, known, count, **scene_choice)
            # pictures of pixels gain nothing as SVG
            files["figures/figure2.png"] = encode(figure)["png"]
        else:
            click.echo("no Figure 2 without weights and images: give --data-dir")
        records.write_files(out, files)
    _print_tables(known)
    click.echo(f"{', '.join(files)} in {out}")


# ---------------------------------------------------------------- shared


@contextmanager
def open_segmentation(options: dict[str, Any]) -> Iterator[tuple[SegmentConfig, Job]]:
    """The config and the opened folder of a command with `training_options`."""
    from unitnorm.run.devices import count_cores
    from unitnorm.segment.schema import SCHEMA

    chosen = opt.take_training_options(options)
    config = _read_config(**options)

    def load() -> tuple[Any, ...]:
        from unitnorm.segment.data import COUNTS, load_scenes
        from unitnorm.segment.experiment import describe_data, list_cells

        data = load_scenes(config.data)
        about = describe_data(data)
        for name, count in COUNTS.items():
            if data.name == "camvid" and about["images"][name] != count:
                click.echo(
                    f"note: {about['images'][name]} images in {name}/; the whole of CamVid has "
                    f"{count}"
                )
        return data, about, list_cells(config)

    # a CPU device per core, as many as divide a mini-batch
    devices = chosen.devices or math.gcd(count_cores(), config.train.batch_size)
    with open_job(SCHEMA, config, load, replace(chosen, devices=devices)) as job:
        yield config, job


def do_sweep(config: SegmentConfig, job: Job) -> None:
    """Sweep the updates without a recorded sweep."""
    from unitnorm.segment import experiment

    if not experiment.list_missing(experiment.list_cells(config, 1), job.records["sweep"]):
        job.session.say("sweep: every selected update has its learning rate; --fresh starts over")
    experiment.sweep_missing(config, job.data, job.records, job.session, job.store)


def _read_config(
    config_path: str | None = None, overrides: tuple[str, ...] = (), **given: Any
) -> SegmentConfig:
    from unitnorm.segment.config import SegmentConfig

    if given["data__data_dir"] is not None and given["data__dataset"] is not None:
        raise UserError("--data-dir and --synthetic: give one of them")
    return opt.read_config(SegmentConfig, config_path, overrides, **given)


def _scenes_for(trained: TrainedSegNet, **scene_choice: Any) -> SceneData:
    """The images at the size that the weights were trained on."""
    from unitnorm.segment.data import load_scenes

    height, width = trained.size
    return load_scenes(_read_config(data__height=height, data__width=width, **scene_choice).data)


def _draw_figure2(out: Path, known: Records, count: int, **scene_choice: Any) -> Any:
    import numpy as np

    from unitnorm.report.style import label, sort_updates
    from unitnorm.segment import pictures, predicting
    from unitnorm.segment.weights import read_weights

    names = sort_updates(name.removesuffix(".safetensors") for name in known.files)
    loaded = {update: read_weights(out / f"{update}.safetensors") for update in names}
    data = _scenes_for(next(iter(loaded.values())), **scene_choice)
    about = known.provenance["data"]
    if data.size == (about["height"], about["width"]) and data.sha256 != about["sha256"]:
        raise UserError(
            f"{scene_choice['data__data_dir'] or 'synthetic'}: not the images of these records; "
            f"expected {about['name']} with SHA-256 {about['sha256'][:12]}…"
        )
    test = data.splits["test"]
    # evenly over the test set, whose images stand in the order of the drive
    chosen = np.linspace(0, len(test.labels), count, endpoint=False).astype(int)
    shown = test.only(np.unique(chosen + len(test.labels) // (2 * count)))
    predictions = {}
    for update, trained in loaded.items():
        predictor = predicting.make_predictor(trained)
        predictions[label(update)] = [
            predicting.predict_labels(predictor, image) for image in shown.images
        ]
    return pictures.draw_samples(list(shown.images), list(shown.labels), predictions)


def _print_tables(known: Records) -> None:
    from rich.console import Console

    from unitnorm.report.tables import Fitting
    from unitnorm.segment.schema import FIGURES
    from unitnorm.segment.tables import list_tables

    console = Console()
    for cells in list_tables(known, FIGURES):  # with the classes it would be too wide
        console.print(Fitting(cells))
