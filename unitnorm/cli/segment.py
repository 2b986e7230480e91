"""The commands `unitnorm segment …`: read options, call the package, print."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unitnorm.cli import options as opt
from unitnorm.errors import UserError
from unitnorm.run.job import Loaded, open_job

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from unitnorm.report.tables import Cells
    from unitnorm.run.records import Records
    from unitnorm.segment.config import SegmentConfig
    from unitnorm.segment.data import SceneData
    from unitnorm.segment.weights import TrainedSegNet

OUT = "runs/segnet"
# a link to results/segnet/renewed/un.safetensors
PUBLISHED = Path(__file__).parents[1] / "segment" / "un.safetensors"
FILE = click.Path(path_type=Path, dir_okay=False)


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


command = partial(segment.command, cls=opt.GroupedCommand)
scene_options = opt.together(
    opt.data_option("--data-dir", "data__data_dir",
                    help="Folder of CamVid: train/, trainannot/, val/ …"),
    opt.data_option("--synthetic", "data__dataset", flag_value="synthetic",
                    help="Invented scenes instead of CamVid."),
)  # fmt: skip


def weights_option(*, multiple: bool = False) -> opt.Decorator:
    """--weights, once or several times."""
    often = "; may be repeated" if multiple else ""
    return opt.records_option(
        "--weights", type=click.Path(path_type=Path), multiple=multiple,
        default=[PUBLISHED] if multiple else PUBLISHED,
        help=f"File that train wrote{often}.  [default: UN's, which are part of unitnorm]",
    )  # fmt: skip


training_options = opt.together(
    opt.config_option("segnet_small"), opt.update_option, opt.runs_option, opt.seed_option,
    scene_options, opt.training_options(OUT),
)  # fmt: skip


@command(short_help="Choose each update's learning rate.")
@training_options
@opt.selection_option("--rate", "sweep__rates", type=float, multiple=True,
                      help="Rate to try; may be repeated.  [default: the config's]")  # fmt: skip
def sweep(**options: Any) -> None:
    """Choose each update's base learning rate on a sequence of training images held out.

    \b
    Example
      unitnorm segment sweep --config segnet --data-dir CamVid --rate 0.3 --rate 1
    """
    do_training(options, sweep_only=True)


@command(short_help="Train SegNet-Basic with each update.")
@training_options
def train(**options: Any) -> None:
    """Train SegNet-Basic with each update; stop with Ctrl-C, go on by the same command.

    An update without a learning rate in the config is swept first.

    \b
    Example
      unitnorm segment train --config segnet --data-dir CamVid --update un
    """
    do_training(options)


@command(short_help="Measure trained weights on a split.")
@weights_option(multiple=True)
@opt.records_option("--save", type=FILE, help="Markdown file to write the table to, too.")
@opt.data_option("--split", type=click.Choice(["train", "val", "test"]),
                 default="test", show_default=True, help="Which images.")  # fmt: skip
@scene_options
def evaluate(weights: tuple[Path, ...], save: Path | None, split: str, **scene_choice: Any) -> None:
    """Measure trained weights on a split of CamVid; one file by sequence, too.

    \b
    Example
      unitnorm segment evaluate --data-dir CamVid --weights un.safetensors
    """
    from unitnorm.report.tables import to_page
    from unitnorm.segment.evaluation import Evaluator
    from unitnorm.segment.schema import ALL
    from unitnorm.segment.tables import tabulate

    loaded = _open_weights(weights, devices=None)
    if len({trained.size for trained in loaded}) > 1:
        raise UserError("--weights: trained on images of different sizes; measure them one by one")
    data = _load_for(loaded[0], scene_choice)
    scenes, (height, width) = data.splits[split], data.size
    matrices = [Evaluator(one.network).by_sequence(one.weights, scenes) for one in loaded]
    names = [f"{path.parent.name}/{path.stem}" for path in weights]
    if len(set(names)) < len(names):
        names = list(map(str, weights))
    columns = {name: found[ALL] for name, found in zip(names, matrices, strict=True)}
    if len(loaded) == 1:
        columns = {loaded[0].update: matrices[0].pop(ALL)} | matrices[0]
    title = f"{data.name} {split}, {len(scenes.labels)} images of {height}×{width}"
    table = tabulate(title, columns)
    if save is not None:
        _write(save.parent, {save.name: to_page([table]).encode()})
    _print([table])


@command(short_help="Recompute batch statistics.")
@opt.config_option("segnet_small")
@weights_option()
@scene_options
@opt.records_option("--out", type=FILE, default=Path("runs/renewed.safetensors"),
                    show_default=True, help="File to write.")  # fmt: skip
def renew(weights: Path, out: Path, **options: Any) -> None:
    """Recompute the batch statistics of trained weights, as the config's train.statistics says.

    Over the training images of the data given, at the size that the weights were trained for.

    \b
    Example
      unitnorm segment renew --config segnet --data-dir CamVid
    """
    from unitnorm.segment.training import SegNetProgram
    from unitnorm.segment.weights import pack_weights

    config = _read_config(**options)
    if config.train.statistics == "running":
        raise UserError(
            'train.statistics = "running": nothing to average; expected "batches" or "images"'
        )
    (trained,) = _open_weights([weights])
    splits = _load_for(trained, options).splits
    program = SegNetProgram(
        "renew", config.model_copy(update={"network": trained.network}), trained.update,
        config.seed, 1.0, [1.0], (splits["train"], splits["val"]),
    )  # fmt: skip
    found = program.with_statistics(trained.weights, 1)
    _write(out.parent, {out.name: pack_weights(trained._replace(weights=found))})
    click.echo(f"{weights}: statistics of {program.samples} images in {out}")


@command(short_help="Segment photos.")
@opt.argument("images", text="Photos.", nargs=-1, required=True, type=click.Path(path_type=Path))
@weights_option()
@opt.option("--overlay", is_flag=True, help="NAME_overlay.png too: the photo under the colours.")
@opt.out_option("runs/predictions", "Folder of the PNGs.")
def predict(images: tuple[Path, ...], weights: Path, overlay: bool, out: Path) -> None:
    """Segment photos of any size, files or whole folders, and write PNGs.

    NAME_labels.png has the photo's size, the classes as its numbers and CamVid's colours as its
    palette; NAME_figure.png shows photo and prediction with a legend. The classes' shares of the
    photo are printed. Files that cannot be read are named at the end.

    \b
    Example
      unitnorm segment predict street.jpg --overlay
    """
    from unitnorm.segment import predicting

    paths, failed = predicting.list_photos(images), []
    predictor = predicting.make_predictor(*_open_weights([weights]))
    for path in paths:
        try:
            photo = predicting.open_photo(path)
        except UserError as error:
            failed.append(str(error))
            continue
        labels = predictor(photo)
        drawn = predicting.draw_all(photo, labels, overlay=overlay)
        files = {f"{path.stem}_{name}.png": content for name, content in drawn.items()}
        _write(out, files)
        click.echo(f"{path}: {predicting.describe_shares(labels)}")
        click.echo(f"  {', '.join(files)} in {out}{os.sep}")
    if failed:
        many = f"{len(failed)} of {len(paths)} images failed: " if len(paths) > 1 else ""
        raise UserError(many + "; ".join(failed))


@command(short_help="Tables and figures, from the records.")
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
    from unitnorm.report.style import encode
    from unitnorm.report.tables import to_page
    from unitnorm.run import records
    from unitnorm.segment import pictures, schema, tables

    with records.locked(out, make=False):
        known = records.read(out, schema.SCHEMA)
        if known.is_empty():
            raise UserError(f"{out}: no records here; run `unitnorm segment train --out {out}`")
        files = {"table.md": to_page(tables.list_tables(known)).encode()}
        if not known["history"].empty:
            drawn = encode(pictures.draw_curves(known["metrics"], known["history"]))
            files |= {f"figures/curves.{ending}": drawn[ending] for ending in ("png", "svg")}
        if any(scene_choice.values()) and known.files:
            figure = _draw_figure2(out, known, count, scene_choice)
            # pictures of pixels gain nothing as SVG
            files["figures/figure2.png"] = encode(figure)["png"]
        else:
            click.echo("no Figure 2 without weights and images: give --data-dir")
        records.write_files(out, files)
    _print(tables.list_tables(known, schema.FIGURES))
    click.echo(f"{', '.join(files)} in {out}")


def do_training(options: dict[str, Any], *, sweep_only: bool = False) -> None:
    """Sweep and train what is missing in the folder of a command with `training_options`."""
    from unitnorm.run.devices import count_cores
    from unitnorm.run.planner import complete
    from unitnorm.segment.experiment import Segmentation, describe_data, list_cells
    from unitnorm.segment.schema import FIGURES
    from unitnorm.segment.tables import list_tables

    chosen = opt.take_training_options(options)
    config = _read_config(**options)

    def load() -> Loaded:
        data, cells = _load(config), list_cells(config)
        return Loaded({"": data}, describe_data(data), 0 if sweep_only else len(cells), cells)

    # a CPU device per core, as many as divide a mini-batch
    devices = chosen.devices or math.gcd(count_cores(), config.train.batch_size)
    experiment = Segmentation(config, sweep_only)
    with open_job(experiment, config, load, replace(chosen, devices=devices)) as job:
        groups = list(experiment.missing(job.records))
        swept = [group.what[0] for group in groups if group.table == "sweep"]
        if not groups:
            of_sweep = "sweep: every selected update has its learning rate"
            done = of_sweep if sweep_only else "train: every selected run is recorded"
            job.session.say(f"{done}; --fresh starts over")
        elif swept and not sweep_only:
            job.session.say(f"train: {', '.join(swept)}: no learning rate yet, sweeping first")
        complete(job)
        _print(list_tables(job.records, FIGURES))


def _read_config(
    config_path: str | None = None, overrides: tuple[str, ...] = (), **given: Any
) -> SegmentConfig:
    from unitnorm.segment.config import SegmentConfig

    if given["data__data_dir"] is not None and given["data__dataset"] is not None:
        raise UserError("--data-dir and --synthetic: give one of them")
    return opt.read_config(SegmentConfig, config_path, overrides, **given)


def _load(config: SegmentConfig) -> SceneData:
    """The config's images, with their notes printed."""
    from unitnorm.segment.data import load_scenes

    data = load_scenes(config.data)
    for note in data.notes:
        click.echo(f"note: {note}")
    return data


def _open_weights(paths: Iterable[Path], devices: int | None = 1) -> list[TrainedSegNet]:
    """The weights in files, once JAX has so many CPU devices; None: one per core."""
    from unitnorm.run.devices import prepare
    from unitnorm.segment.weights import read_weights

    prepare(devices)
    return [read_weights(path) for path in paths]


def _load_for(trained: TrainedSegNet, options: dict[str, Any]) -> SceneData:
    """The images at the size that the weights were trained on."""
    height, width = trained.size
    return _load(_read_config(data__height=height, data__width=width, **options))


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Files into a folder, which is made if need be."""
    from unitnorm.run import records

    with records.locked(folder):
        records.write_files(folder, files)


def _print(tables: Iterable[Cells]) -> None:
    from rich.console import Console

    from unitnorm.report.tables import Fitting

    Console().print(*map(Fitting, tables), sep="")


def _draw_figure2(out: Path, known: Records, count: int, scene_choice: dict[str, Any]) -> Figure:
    from PIL import Image

    from unitnorm.report.style import label, sort_updates
    from unitnorm.segment import pictures, predicting

    updates = sort_updates(name.removesuffix(".safetensors") for name in known.files)
    loaded = _open_weights(out / f"{update}.safetensors" for update in updates)
    data = _load_for(loaded[0], scene_choice)
    about = known.provenance["data"]
    if data.size == (about["height"], about["width"]) and data.sha256 != about["sha256"]:
        raise UserError(
            f"{scene_choice['data__data_dir'] or 'synthetic'}: not the images of these records; "
            f"expected {about['name']} with SHA-256 {about['sha256'][:12]}…"
        )
    images, labels, _ = data.splits["test"].pick(count)
    photos, rows = list(map(Image.fromarray, images)), {"ground truth": list(labels)}
    for update, trained in zip(updates, loaded, strict=True):
        rows[label(update)] = list(map(predicting.make_predictor(trained), photos))
    return pictures.draw_samples(images, rows)
