"""The command line: one thin command for each stage, and the one place where errors end.

Exit codes: 0 done; 1 an error that the user can fix; 2 wrong usage; 75 stopped by a signal, and
the same command continues. The stages are imported inside the commands: ``--help`` needs no torch.
"""

import io
import json
import re
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from sfkt_cli import __version__
from sfkt_cli.console import event, outlets, output, tell, warn
from sfkt_cli.errors import Interrupted, explain, on_stop
from sfkt_cli.methods import ENCODED, METHODS
from sfkt_cli.settings.options import FINISHED, SETTINGS, STAGE, TRAINING, Options, shared_options


class _Program(TyperGroup):
    """Points from an unknown option, such as ``--epochs``, to the setting of that name."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty arguments: an empty path would be the working folder."""
        for before, argument in zip(["sfkt", *args], args, strict=False):
            if not argument or re.fullmatch("--[a-z-]+=", argument):
                name = (argument or before).rstrip("=")
                ctx.fail(f"the argument after {name!r} is empty: leave it out, or give a value")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":  # typer shows only its base class
                from sfkt_cli.settings.config import section_fields

                end = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
                names = [name for name in section_fields() if name.rpartition(".")[2] == end]
                own = [name for name in names if name.startswith(f"{ctx.invoked_subcommand}.")]
                meant = [f"--set {name}=VALUE" for name in (own or names)[:3]]
                hint = f". Did you mean {' or '.join(meant)}?" if meant else ""
                error.message += hint  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    cls=_Program,
    help="Turn an RGB classifier into a depth, near-infrared or thermal one, "
    "without its training images and without labels.",
    epilog="Order: prepare, source, bridge, transfer, evaluate.\n\n"
    "Settings: `sfkt config show`.\n\nExample: sfkt run",
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
Result = Mapping[str, Any]  # what a command found: the last line of ``--json``


def _train(stage: str, options: Options) -> Result:
    """Run a training stage, or ``run`` all, or with ``--dry-run`` say what that would do.

    Process 0 of torchrun or SLURM runs the stage, and the others follow. All other commands run
    alone, whatever variables a launcher left in the environment.
    """
    if options.dry_run:
        from sfkt_cli.dry_run import dry_run

        return dry_run(stage, options)
    from sfkt_cli.launch import run_under_launcher
    from sfkt_cli.pipeline import run_all, train

    def command() -> Result:
        return run_all(options) if stage == "run" else train(stage, options)

    return run_under_launcher(command) or {}


def _datasets() -> list[str]:
    from sfkt_cli.settings.config import DatasetName

    return [*get_args(DatasetName)]


DatasetArgument = Annotated[
    str | None,
    Argument(
        help="Data set: synthetic, rgb-nir, nyu-depth, sun-rgbd, folders, ...",
        autocompletion=_datasets,
    ),
]
Root = Annotated[Path | None, Option(help="Folder or file of the archive; default: data/NAME.")]
MethodOption = Annotated[
    str | None,
    Option(
        help=f"Transfer method: {', '.join(METHODS)}; default: the setting transfer.method.",
        autocompletion=lambda: [*METHODS],
    ),
]
ShippedOption = Annotated[
    str | None,
    Option(
        "--method",
        help=f"Student of this method: {', '.join(METHODS)}; or {ENCODED}: the source model with "
        "the student's encoding. Default: the setting transfer.method.",
        autocompletion=lambda: [*METHODS, ENCODED],
    ),
]
SensorOption = Annotated[str | None, Option(help="SUN RGB-D: kv1, kv2, realsense or xtion.")]


def _print_version(version: bool) -> None:
    if version:
        typer.echo(f"sfkt {__version__}")
        raise typer.Exit


@app.callback()
def _sfkt(
    version: Annotated[
        bool,
        Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    del version


@app.command(epilog="Example: sfkt prepare rgb-nir --root ~/nirscene1")
@shared_options(*STAGE)
def prepare(
    options: Options,
    name: DatasetArgument = None,
    root: Root = None,
    download: Annotated[
        bool, Option("--download", help="First download the archive into the folder --root.")
    ] = False,
    accept_licence: Annotated[
        bool,
        Option("--accept-licence", help="Accept the data set's licence without being asked."),
    ] = False,
    source_sensor: SensorOption = None,
    target_sensor: SensorOption = None,
) -> Result:
    """Read an archive and write the three files of a run.

    source opens source.h5, bridge and transfer open transfer.h5, and only evaluate opens test.h5.
    """
    from sfkt_cli.settings.config import merge
    from sfkt_cli.settings.resolve import typed_settings

    if name is None and "dataset" not in merge(*typed_settings(options).values()):
        raise typer.BadParameter("which data set? For example: sfkt prepare synthetic")
    options = options.with_flags(
        {
            "dataset": name,
            "prepare.root": root,
            "sun_rgbd.source_sensor": source_sensor,
            "sun_rgbd.target_sensor": target_sensor,
        }
    )
    if options.dry_run:
        from sfkt_cli.dry_run import dry_run

        return dry_run("prepare", options, download=download)
    from sfkt_cli.pipeline import run_prepare

    run = run_prepare(options, download=download, accept_licence=accept_licence)
    return run.outcome("prepare")


@app.command(epilog="Example: sfkt source --set source.epochs=30")
@shared_options(*TRAINING)
def source(options: Options) -> Result:
    """Train the RGB source model, or import yours."""
    return _train("source", options)


@app.command(epilog="Example: sfkt bridge --gpus 2")
@shared_options(*TRAINING)
def bridge(options: Options) -> Result:
    """Train the translator and write the translated target images."""
    return _train("bridge", options)


@app.command(epilog="Example: sfkt transfer --method shot")
@shared_options(*TRAINING)
def transfer(options: Options, method: MethodOption = None) -> Result:
    """Train the student, the classifier for the target sensor."""
    return _train("transfer", options.with_flags({"transfer.method": method}))


@app.command(epilog="Example: sfkt evaluate --report table.md")
@shared_options(*STAGE)
def evaluate(
    options: Options,
    report: Annotated[
        Path | None,
        Option(help="Also write the report here; the suffix (md, html, json, tex) is its format."),
    ] = None,
    method: MethodOption = None,
) -> Result:
    """Measure every model of the run; write tables and pictures.

    The student of the method is the one that is judged.
    """
    options = options.with_flags({"transfer.method": method})
    if options.dry_run:
        from sfkt_cli.dry_run import dry_run

        return dry_run("evaluate", options)
    from sfkt_cli.pipeline import run_evaluate

    return run_evaluate(options, report)


@app.command(epilog="Example: sfkt run my.yaml --set seed=1")
@shared_options(*TRAINING)
def run(
    options: Options,
    file: Annotated[
        Path | None,
        Argument(metavar="[CONFIG.yaml]", help="Settings; default: those of the built-in demo."),
    ] = None,
) -> Result:
    """Run every stage that is not finished, and print the table."""
    if file is not None and options.config is not None:
        raise typer.BadParameter("give the settings once: sfkt run CONFIG.yaml")
    return _train("run", replace(options, config=file or options.config))


@app.command(epilog="Example: sfkt benchmark compare.yaml --processes 2")
@shared_options("assignments", "gpus", "dry_run")
def benchmark(
    options: Options,
    file: Annotated[
        Path | None,
        Argument(metavar="[CONFIG.yaml]", help="What to compare; default: a small demo."),
    ] = None,
    output: Annotated[
        Path | None, Option(help="Folder to write; default: `output` in the file.")
    ] = None,
    processes: Annotated[
        int,
        Option(
            min=0,
            help="Number of stages to run at once, each in a new process; 0: all in this one.",
        ),
    ] = 1,
) -> Result:
    """Compare methods over seeds, data sets and settings.

    The tables show means, standard deviations, paired differences and costs.
    """
    from sfkt_cli.pipeline import run_benchmark

    return run_benchmark(options, file, output, processes)


@app.command(epilog="Example: sfkt export --format onnx --output model/")
@shared_options(*FINISHED, "force")
def export(
    options: Options,
    method: ShippedOption = None,
    formats: Annotated[
        list[str] | None,
        Option("--format", help="onnx, pt2 or safetensors; default: all that can be written here."),
    ] = None,
    output: Annotated[Path | None, Option(help="Folder to write; default: <run>/export.")] = None,
    input_size: Annotated[
        str | None,
        Option(
            metavar="HEIGHTxWIDTH",
            help="Size of the sensor's images; the file then also crops and resizes.",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        Option(
            help="Precision of ONNX files: fp32 (default), fp16, int8; may be given several times."
        ),
    ] = None,
    input_type: Annotated[
        str | None,
        Option(
            help="Type of the input: float32 for runtimes without uint16; default: the sensor's."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        Option(min=1, help="Number of images that the files take at once; default: any."),
    ] = None,
    benchmark: Annotated[
        bool,
        Option("--benchmark", help="Time PyTorch, onnxruntime and OpenVINO in fp32 and int8."),
    ] = False,
) -> Result:
    """Write the models as files that run without this program.

    The files hold the student, and the translator followed by the source model.
    """
    from sfkt_cli.pipeline import resolve_and_remember

    settings = resolve_and_remember("transfer", replace(options, force=False))  # the student stays
    from sfkt_cli.stages.export import export

    export(
        settings.config,
        replace(settings.run, force=options.force),
        method=method,
        formats=tuple(formats or ()),
        precisions=tuple(precision or ()),
        output=output,
        input_size=input_size,
        input_type=input_type,
        batch=batch,
        benchmark=benchmark,
    )
    return settings.run.outcome("export", output)


@app.command(epilog="Example: sfkt predict scans/*.png --output predictions.csv")
@shared_options(*FINISHED)
def predict(
    options: Options,
    images: Annotated[
        list[str],
        Argument(
            help="Target images: files, folders, patterns, or - for a list on stdin; or one video "
            "file, camera number or address (rtsp://...)."
        ),
    ],
    output: Annotated[
        Path | None,
        Option(
            help="File to write, .csv or .jsonl; - for CSV on standard output; default: "
            "predictions.csv, or stream.csv for watched folders and cameras."
        ),
    ] = None,
    method: ShippedOption = None,
    model: Annotated[
        Path | None,
        Option(help="Exported student (folder or ONNX file) to use instead of a run's."),
    ] = None,
    top_k: Annotated[int, Option(min=1, help="Number of classes to list for each image.")] = 1,
    threshold: Annotated[
        float,
        Option(
            min=0,
            max=1,
            help="Call less probable classes, and images with a warning, unknown; rows keep the "
            "probability of the class that is hidden.",
        ),
    ] = 0.0,
    save_images: Annotated[
        Path | None, Option(help="Folder in which to save each image with its class below.")
    ] = None,
    follow: Annotated[
        bool, Option("--follow", help="Watch the folders for new images until Ctrl-C.")
    ] = False,
) -> Result:
    """Classify images of the target sensor with the run's student."""
    from sfkt_cli.pipeline import resolve_and_remember

    settings = resolve_and_remember("transfer", options, new_run=model is not None)
    from sfkt_cli.stages.predict import predict

    return predict(
        settings.config,
        settings.run,
        images,
        output=output,
        top_k=top_k,
        method=method,
        model=model,
        threshold=threshold,
        save_images=save_images,
        follow=follow,
    )


@app.command(epilog="Example: sfkt inspect --verify")
@shared_options("run")
def inspect(
    options: Options,
    file: Annotated[
        Path | None,
        Argument(help="A prepared file; default: transfer.h5 of the run used last."),
    ] = None,
    output: Annotated[
        Path | None, Option("--output", "--out", help="PNG to write; default: beside the file.")
    ] = None,
    verify: Annotated[
        bool, Option("--verify", help="Read every row and compare the checksums.")
    ] = False,
) -> Result:
    """Show what a prepared file holds and what looks wrong in it."""
    from sfkt_cli.settings.resolve import find_run
    from sfkt_cli.stages.inspect import inspect

    if file is None:
        run = find_run(options, None, new_run=False)
        run.require("prepare")
        file = run.transfer_store
    return inspect(file, output, verify)


@app.command(epilog="Example: sfkt classes sun-rgbd --root ~/SUNRGBD")
@shared_options("config", "assignments")
def classes(options: Options, name: DatasetArgument = None, root: Root = None) -> Result:
    """List the classes of an archive and what they are used for.

    Without a name, it is the archive of the last run.
    """
    from sfkt_cli.data.readers import read_archive
    from sfkt_cli.data.splits import list_class_rows
    from sfkt_cli.settings.resolve import has_run, resolve

    options = options.with_flags({"dataset": name, "prepare.root": root})
    config = resolve(options, "prepare", new_run=not has_run(options)).config
    rows = list_class_rows(config.classes, read_archive(config), config.source.classes)
    output("role\timages\tpairs\tgroups\tclass")
    for row in rows:
        output(f"{row.role}\t{row.images}\t{row.pairs}\t{row.groups}\t{row.name}")
    return {"classes": [asdict(row) for row in rows]}


@config_app.command("show", epilog="Example: sfkt config show --set bridge.epochs=30")
@shared_options(*SETTINGS)
def config_show(options: Options) -> Result:
    """Print every setting, and where its value came from."""
    from sfkt_cli.settings.resolve import has_run, origins, resolve, show

    if options.run is not None and not options.run.exists():
        warn(f"{options.run} does not exist: these are the settings of a new run")
    settings = resolve(options, "transfer", new_run=not has_run(options))
    output(show(settings))
    return {"settings": origins(settings)}


@config_app.command("check", epilog="Example: sfkt config check my.yaml")
@shared_options()
def config_check(
    options: Options, file: Annotated[Path, Argument(help="YAML file with settings.")]
) -> Result:
    """Check a configuration file and name all its problems at once."""
    from sfkt_cli.pipeline import check_file
    from sfkt_cli.settings.config import one_line

    changes = check_file(file)
    number = f"{len(changes)} setting{'s'[: len(changes) != 1]}"
    output(f"{file} is valid; it changes {number}")
    for name, value in changes.items():
        output(f"  {name} = {one_line(value)}")
    return {"file": file, "changes": changes}


@config_app.command("init", epilog="Example: sfkt config init nyu-depth > my.yaml")
@shared_options()
def config_init(
    options: Options, name: Annotated[str, Argument(help="Data set.")] = "synthetic"
) -> Result:
    """Print a commented configuration file for a data set."""
    from sfkt_cli.settings.resolve import commented_yaml

    text = commented_yaml(name)
    output(text.removesuffix("\n"))
    return {"dataset": name, "yaml": text}


@config_app.command("schema", epilog="Example: sfkt config schema > sfkt.schema.json")
@shared_options()
def config_schema(options: Options) -> Result:
    """Print a JSON Schema of the settings, for editors."""
    from sfkt_cli.settings.config import Config

    schema = Config.model_json_schema()
    output(json.dumps(schema, indent=2))
    return {"schema": schema}


app.add_typer(config_app, name="config")


@app.command(epilog="Example: sfkt doctor --verify runs/synthetic")
@shared_options()
def doctor(
    options: Options,
    verify: Annotated[
        Path | None,
        Option(help="Run whose files to read and compare with their checksums."),
    ] = None,
) -> Result:
    """Say what this machine has, what is missing, and what helps."""
    from sfkt_cli.stages.doctor import doctor

    return doctor(verify)


def main() -> None:
    """Run the program; an error that the user can fix is one message, without a traceback."""
    if sys.stdin is None:  # closed by whoever started the program: there is nothing to read
        sys.stdin = io.StringIO()
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):  # file names are bytes, terminals may be ASCII
            stream.reconfigure(errors=errors)
    stopped: list[Interrupted] = []

    def stop(number: signal.Signals) -> None:
        """End the command in an orderly way: temporary files and child processes go."""
        stopped.append(
            Interrupted(
                f"stopped by {number.name}: the same command continues after what is finished"
            )
        )
        raise stopped[-1]

    with on_stop(stop) as handlers:
        try:
            app()
        except SystemExit as end:
            if end.code:
                outlets.json = "--json" in sys.argv  # wrong usage: nothing was read yet
                why = "wrong usage: see standard error" if end.code == 2 else "stopped"
                event("error", message=why, exit_code=end.code)
            raise
        except (Exception, Interrupted) as raised:
            for number in handlers:  # a further signal must not change how it ends
                handlers[number] = signal.SIG_IGN
                signal.signal(number, signal.SIG_IGN)
            # A library may have turned the signal into an error of its own, as torch.onnx does.
            error = stopped[0] if stopped and not isinstance(raised, Interrupted) else raised
            message, code = explain(error)
            brought_back = getattr(raised, "__notes__", ())  # there is nothing to go on from
            if message and "--force" in sys.argv:  # which begins anew
                same, instead = "(the same command)(?! again)", r"\1 (without --force)"
                if brought_back:  # a warning has said how to go on
                    same, instead = f"[:;,]?( and)? {same}.*", ""
                message = re.sub(same, instead, message, flags=re.IGNORECASE)
            event("error", message=message or f"{type(error).__name__}: {error}", exit_code=code)
            if message is None:
                raise
            if "--verbose" in sys.argv:
                tell(traceback.format_exc().rstrip())
            if message:
                tell(f"sfkt: {message}")
            sys.exit(code)
