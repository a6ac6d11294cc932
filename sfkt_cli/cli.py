"""The command line: one thin command for each stage, and the one place where errors end.

Exit codes: 0 done; 1 an error that the user can mend; 2 wrong usage; 75 stopped by a signal, and
the same command goes on. The stages are imported inside the commands: ``--help`` needs no torch.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sfkt_cli import __version__
from sfkt_cli.errors import STOPPED, SfktError
from sfkt_cli.options import Options, Verbosity, shared_options
from sfkt_cli.world import found_world, is_main

app = typer.Typer(
    help="Turn an RGB classifier into a depth, near-infrared or thermal one, "
    "without its training images and without labels.",
    epilog="Example: sfkt run",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(
    help="Show, check and write the settings.",
    epilog="Example: sfkt config init nyu-depth > my.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DatasetName = Annotated[
    str | None,
    typer.Argument(help="Data set: synthetic, rgb-nir, nyu-depth, sun-rgbd, folders, ..."),
]
Root = Annotated[
    Path | None, typer.Option(help="Folder or file of the archive; default: data/NAME.")
]
Method = Annotated[str | None, typer.Option(help="Transfer method, such as tgkt, shot or distill.")]
Sensor = Annotated[str | None, typer.Option(help="SUN RGB-D: kv1, kv2, realsense or xtion.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sfkt {__version__}")
        raise typer.Exit


@app.callback()
def _sfkt(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    del version


@app.command(epilog="Example: sfkt prepare rgb-nir --root ~/nirscene1")
@shared_options()
def prepare(
    options: Options,
    name: DatasetName = None,
    root: Root = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the archive to where --root says, first.")
    ] = False,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="The data set's licence is accepted.")
    ] = False,
    source_sensor: Sensor = None,
    target_sensor: Sensor = None,
) -> None:
    """Read an archive and write source.h5, transfer.h5 and test.h5, by who may see what."""
    from sfkt_cli.pipeline import run_prepare
    from sfkt_cli.settings import is_typed

    if name is None and not is_typed(options, "dataset"):
        raise typer.BadParameter("which data set? For example: sfkt prepare synthetic")
    run_prepare(
        options.with_flags(
            {
                **_archive(name, root),
                "sun_rgbd.source_sensor": source_sensor,
                "sun_rgbd.target_sensor": target_sensor,
            }
        ),
        download=download,
        accept_licence=accept_licence,
    )


@app.command(epilog="Example: sfkt source --set source.epochs=30")
@shared_options()
def source(options: Options) -> None:
    """Train the RGB source model on source.h5, or import one that you bring along."""
    from sfkt_cli.pipeline import run_source

    run_source(options)


@app.command(epilog="Example: sfkt bridge --gpus 2")
@shared_options()
def bridge(options: Options) -> None:
    """Train the translator from target images to source-like RGB, and write what it makes."""
    from sfkt_cli.pipeline import run_bridge

    run_bridge(options)


@app.command(epilog="Example: sfkt transfer --method shot")
@shared_options()
def transfer(options: Options, method: Method = None) -> None:
    """Train the classifier for the target sensor, the student."""
    from sfkt_cli.pipeline import run_transfer

    run_transfer(options.with_flags({"transfer.method": method}))


@app.command(epilog="Example: sfkt evaluate --report table.md")
@shared_options()
def evaluate(
    options: Options,
    report: Annotated[
        Path | None, typer.Option(help="Also write the report here; the suffix says which kind.")
    ] = None,
) -> None:
    """Measure every model of the run against the labels, and write tables and pictures."""
    from sfkt_cli.pipeline import run_evaluate

    run_evaluate(options, report)


@app.command(epilog="Example: sfkt run my.yaml --set seed=1")
@shared_options()
def run(
    options: Options,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="Settings; without: the built-in demo."),
    ] = None,
) -> None:
    """Run all stages in order, leaving out the finished ones, and print the table."""
    from sfkt_cli.pipeline import run_all

    if file is not None and options.config is not None:
        raise typer.BadParameter("give the settings once: sfkt run CONFIG.yaml")
    run_all(replace(options, config=file or options.config))


@app.command(epilog="Example: sfkt benchmark sample_configs/benchmark-demo.yaml --processes 2")
@shared_options("assignments", "gpus", "quiet", "verbose")
def benchmark(
    options: Options,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG.yaml]", help="What to compare; without: a small demo."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; default: that of the file.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=0, help="Stages at a time, each in a fresh process; 0: none.")
    ] = 1,
) -> None:
    """Compare methods over seeds, data sets and settings: mean, deviation, difference, cost."""
    from sfkt_cli.pipeline import run_benchmark

    run_benchmark(options, file, output, processes)


@app.command(epilog="Example: sfkt export --format onnx --output model/")
@shared_options()
def export(
    options: Options,
    method: Method = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="onnx, pt2 or safetensors; default: all that are possible."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write; default: <run>/export.")
    ] = None,
    input_size: Annotated[
        str | None,
        typer.Option(
            metavar="HEIGHTxWIDTH",
            help="Of the sensor's images, to put cropping and resizing into the graph, too.",
        ),
    ] = None,
) -> None:
    """Write student and translator with source model as files that run without this program."""
    from sfkt_cli.pipeline import settings_of
    from sfkt_cli.stages.export import export

    settings = settings_of("transfer", options)
    export(
        settings.config,
        settings.run,
        method=method,
        formats=tuple(formats or ()),
        output=output,
        input_size=input_size,
    )


@app.command(epilog="Example: sfkt predict scans/*.png --output predictions.csv")
@shared_options()
def predict(
    options: Options,
    images: Annotated[
        list[str],
        typer.Argument(help="Target images: files, folders, patterns, or - for a list on stdin."),
    ],
    output: Annotated[
        Path, typer.Option(help="File to write, .csv or .jsonl; - for CSV on standard output.")
    ] = Path("predictions.csv"),
    method: Method = None,
    model: Annotated[
        Path | None, typer.Option(help="Folder of an exported student, in place of a run's.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to list for each image.")] = 1,
) -> None:
    """Classify images of the target sensor with the run's student."""
    from sfkt_cli.pipeline import settings_of
    from sfkt_cli.stages.predict import predict

    settings = settings_of("transfer", options, new_run=model is not None)
    predict(
        settings.config,
        settings.run,
        images,
        output=output,
        top_k=top_k,
        method=method,
        model=model,
    )


@app.command(epilog="Example: sfkt inspect --verify")
@shared_options("run", "quiet", "verbose")
def inspect(
    options: Options,
    file: Annotated[
        Path | None,
        typer.Argument(help="A prepared file; default: transfer.h5 of the run used last."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG to write; default: beside the file.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every row and compare the checksums.")
    ] = False,
) -> None:
    """Show what a prepared file holds, as a table and a picture, and warn of what looks wrong."""
    from sfkt_cli.settings import find_run
    from sfkt_cli.stages.inspect import inspect

    path = file or find_run(options, None, new_run=False).transfer_store
    inspect(path, out, verify)


@app.command(epilog="Example: sfkt classes sun-rgbd --root ~/SUNRGBD")
@shared_options("config", "assignments", "quiet", "verbose")
def classes(options: Options, name: DatasetName = None, root: Root = None) -> None:
    """List the classes of an archive, their numbers of images, and what they are used for."""
    from sfkt_cli.settings import resolve
    from sfkt_cli.stages.inspect import list_classes

    settings = resolve(options.with_flags(_archive(name, root)), "prepare", new_run=True)
    rows = list_classes(settings.config)
    typer.echo("role\timages\tpairs\tgroups\tclass")
    for row in rows:
        typer.echo(f"{row.role}\t{row.images}\t{row.pairs}\t{row.groups}\t{row.name}")


app.add_typer(config_app, name="config")


@config_app.command("show", epilog="Example: sfkt config show --set bridge.epochs=30")
@shared_options()
def config_show(options: Options) -> None:
    """Print every setting, and where its value came from."""
    from sfkt_cli.settings import has_run, resolve
    from sfkt_cli.settings_text import show

    typer.echo(show(resolve(options, "transfer", new_run=not has_run(options))))


@config_app.command("check", epilog="Example: sfkt config check my.yaml")
def config_check(
    file: Annotated[Path, typer.Argument(help="YAML file with settings.")],
) -> None:
    """Check a configuration file, and name all its problems at once."""
    from sfkt_cli.settings_text import check

    typer.echo(check(file))


@config_app.command("init", epilog="Example: sfkt config init nyu-depth > my.yaml")
def config_init(
    name: Annotated[str, typer.Argument(help="Data set.")] = "synthetic",
) -> None:
    """Print a commented configuration file for a data set."""
    from sfkt_cli.settings_text import commented_yaml

    typer.echo(commented_yaml(name), nl=False)


@config_app.command("schema", epilog="Example: sfkt config schema > sfkt.schema.json")
def config_schema() -> None:
    """Print a JSON Schema of the settings, for editors."""
    from sfkt_cli.settings_text import json_schema

    typer.echo(json_schema())


@app.command(epilog="Example: sfkt doctor --verify runs/synthetic")
def doctor(
    verify: Annotated[
        Path | None, typer.Option(help="Run whose models and stores are read and compared.")
    ] = None,
) -> None:
    """Say what this machine has, what is missing, and what would help."""
    from sfkt_cli.stages.doctor import doctor

    doctor(verify)


def _archive(name: str | None, root: Path | None) -> dict[str, str | None]:
    return {"dataset": name, "prepare.root": None if root is None else str(root)}


def main() -> None:
    """Run the program; an error that the user can mend is one message, without a traceback."""
    try:
        _run_app()
    except Exception as error:
        message, code = explain(error)
        if message is None:
            raise
        if Verbosity.tracebacks:
            traceback.print_exc()
        print(f"sfkt: {message}", file=sys.stderr)
        sys.exit(code)


def _run_app() -> None:
    """Run the command; of the processes of torchrun or SLURM the first one does, others follow."""
    if found_world() is None:
        app()
        return
    from sfkt_cli.training.launch import dismiss, follow

    if not is_main():
        follow()
        return
    try:
        app()
    except SystemExit as end:
        if not end.code:
            dismiss()
        raise


def explain(error: Exception) -> tuple[str | None, int]:
    """The message and exit code of an error that the user can mend; None: a bug."""
    if isinstance(error, SfktError):
        return str(error), 1
    if isinstance(error, OSError):
        name = re.sub(r"\.([^/]+)\.\d+\.partial$", r"\1", str(error.filename or "a file"))
        if error.errno == errno.ENOSPC:
            return f"the disk is full, {name} was not written: make room", 1
        if error.errno is not None:
            return f"{name}: {error.strerror}", 1
    # Both classes come with torch, which is only asked where it is loaded already.
    loop, torch = sys.modules.get("sfkt_cli.training.loop"), sys.modules.get("torch")
    if loop is not None and isinstance(error, loop.Interrupted):
        return str(error), STOPPED
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "the memory of the GPU is full: set runtime.batch_size lower", 1
    return None, 1
