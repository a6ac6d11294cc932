"""The command line from outside: exit codes, one message, settings and where they come from."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sfkt_cli import cli
from sfkt_cli.cli import app, config_app, main
from sfkt_cli.errors import ConfigError, Interrupted, explain, on_stop
from sfkt_cli.evaluation.labelled import list_to_label
from sfkt_cli.files import write_record, write_settings
from sfkt_cli.methods import METHODS
from sfkt_cli.pipeline import resolve_and_remember
from sfkt_cli.settings.config import Config, build
from sfkt_cli.settings.options import Options
from sfkt_cli.settings.resolve import find_run, origins, remember_run, resolve
from sfkt_cli.settings.runs import Run
from tests.data.make_archives import folders
from tests.stages.evaluation_runs import make_run

ROOT = Path(__file__).parents[1]
TINY = """
image_size: 16
synthetic: {pairs: 120}
prepare: {workers: 1}
training: {min_steps: 2}
source: {epochs: 1, width: 4, bottleneck: 8}
bridge: {epochs: 1, width: 4}
transfer: {epochs: 1}
evaluate: {oracle: false}
runtime: {gpus: 0}
"""


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sfkt(*arguments: str) -> int:
    """Run the program in this process and return its exit code."""
    before = sys.argv
    sys.argv = ["sfkt", *arguments]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    raise AssertionError("main() must exit")


def tiny(**changes: Any) -> str:
    Path("tiny.yaml").write_text(yaml.safe_dump({**yaml.safe_load(TINY), **changes}))
    return "tiny.yaml"


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "sys.argv = ['sfkt', *sys.argv[1:]]\n"
        "from sfkt_cli.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'h5py', 'PIL', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for arguments in ([], ["bridge"], ["config", "show"]):
        command = [sys.executable, "-c", code, *arguments, "--help"]
        before = os.times().children_user
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        assert os.times().children_user - before < 0.5


def test_the_method_that_the_help_calls_the_default_is_the_default() -> None:
    assert next(iter(METHODS)) == build().transfer.method


def test_every_command_is_explained_with_an_example() -> None:
    for group in (app, config_app):
        for command in group.registered_commands:
            assert (command.epilog or "").startswith("Example: sfkt ")
            assert command.callback is not None
            assert (command.callback.__doc__ or "").strip().endswith(".")


def test_the_package_itself_imports_no_torch() -> None:
    code = "import sys, sfkt_cli; assert 'torch' not in sys.modules; sfkt_cli.load_student"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_wrong_usage_is_2_and_errors_are_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert sfkt("--version") == 0
    assert sfkt("brigde") == 2
    assert sfkt("bridge", "--gpu", "1", "--nosuch") == 2
    assert sfkt("prepare") == 2
    capsys.readouterr()
    assert sfkt("bridge", "--seed") == 2
    assert "Did you mean" not in capsys.readouterr().err, "the option is right"
    for empty in (["--run", ""], ["--run="], ["--config", ""]):  # an unset variable of the shell
        assert sfkt("bridge", *empty) == 2
        assert empty[0].rstrip("=") in capsys.readouterr().err
    for arguments, expected in (
        (["bridge"], "first run `sfkt prepare NAME`"),
        (["transfer", "--run", "runs/x"], "first run `sfkt prepare NAME --run runs/x`"),
        (["prepare", "rgb-nir", "--root", "absent"], "absent does not exist"),
        (["prepare", "synthetic", "--set", "bridge.epocs=3"], "did you mean bridge.epochs?"),
        (["bridge", "--set", "bridge.epocs=3"], "did you mean bridge.epochs?"),
        (["prepare", "synthetic", "--set", "seed=-1"], "setting seed = -1"),
        (["prepare", "synthetic", "--set", "seed"], "section.field=value"),
        (["prepare", "nyu-depth", "--download"], "--accept-licence"),
        (["prepare", "synthetic", "--download"], "synthetic"),
        (["run", "absent.yaml"], "absent.yaml does not exist"),
        (["doctor", "--verify", "absent"], "is it a run"),
    ):
        assert sfkt(*arguments) == 1, arguments
        said = capsys.readouterr().err
        assert expected in said.replace("start with `sfkt prepare", "first run `sfkt prepare")
        assert "Traceback" not in said
    assert not Path("runs/current").exists()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_a_library_turns_into_its_own_error_stops_the_command(
    kind: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if signal.getsignal(kind) is signal.SIG_IGN:
        pytest.skip(f"{kind.name} is ignored here, as under nohup")

    def export() -> None:
        try:
            signal.raise_signal(kind)
        except BaseException as error:
            raise RuntimeError("export failed") from error

    monkeypatch.setattr(cli, "app", export)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 75
    assert f"sfkt: stopped by {kind.name}: " in capsys.readouterr().err
    assert signal.getsignal(kind) is signal.SIG_IGN, "another one must not change how it ends"


def test_a_further_signal_while_the_end_is_told_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            signal.raise_signal(signal.SIGTERM)
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", shown := Terminal())
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 75
    assert shown.getvalue().startswith("sfkt: stopped by SIGTERM: ")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As Ctrl-C is in what a script starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with on_stop(lambda number: None):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bridge"], "bridge stopped; the same command continues"),
        (["bridge", "--force"], "bridge stopped; The same command (without --force) continues"),
        (["bridge", "--force", "lost"], "bridge stopped"),
    ],
)
def test_what_goes_on_with_force_is_the_command_without_it(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop() -> None:
        the = "The" if arguments[-1] == "--force" else "the"
        stopped = Interrupted(f"bridge stopped; {the} same command continues from here")
        if arguments[-1] == "lost":
            stopped.add_note("bridge is what it was before")
        raise stopped

    monkeypatch.setattr(cli, "app", stop)
    assert sfkt(*arguments) == 75
    goes_on = " from here" * (arguments[-1] != "lost")
    assert capsys.readouterr().err.splitlines()[-1] == f"sfkt: {says}{goes_on}"


def test_errors_that_the_user_can_mend_have_a_message_and_a_code() -> None:
    assert explain(Interrupted("stopped")) == ("stopped", 75)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/.model.json.17.partial")
    expected = "the disk is full, runs/a/model.json was not written: make room"
    assert explain(full) == (expected, 1)
    full.filename = "runs/a/export/.export.x_1.partial/student/.model.json.17.partial"
    assert "full, runs/a/export/student/model.json was not" in str(explain(full)[0])
    denied = PermissionError(errno.EACCES, "Permission denied", "runs")
    assert explain(denied) == (
        "runs: Permission denied: choose a place that you may read and write",
        1,
    )
    quota = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "runs/a")
    assert "make room" in str(explain(quota)[0])
    assert explain(ZeroDivisionError("a bug"))[0] is None


def test_run_does_all_stages_and_leaves_out_the_finished_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sfkt("run", tiny()) == 0
    said = capsys.readouterr().err
    assert "tgkt" in said
    assert "source-only" in said
    run = Path("runs/synthetic")
    assert Path("runs/current").read_text().strip() == str(run)
    for stage in ("prepare", "source", "bridge", "transfer/tgkt", "evaluate"):
        assert (run / stage / "done.json").is_file()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")}
    assert sfkt("run", "tiny.yaml", "--quiet") == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")}
    assert "warning" not in capsys.readouterr().err
    # What a run was made with is remembered: nothing is refused, and nothing starts anew.
    assert sfkt("bridge") == 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("model.safetensors")}
    assert sfkt("bridge", "--set", "bridge.epochs=2") == 1
    assert "bridge.epochs: was 1, now 2" in capsys.readouterr().err
    assert sfkt("bridge", "--set", "bridge.epochs=2", "--force") == 0


def test_evaluate_judges_the_student_that_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(Path("made"), "tgkt", "shot", labelled=False)
    for method in ("shot", "tgkt"):
        assert sfkt("evaluate", "--run", "made", "--method", method) == 0
        assert f"images on which the student {method} and your RGB model differ" in " ".join(
            capsys.readouterr().err.split()
        )
        assert list_to_label(run, method).is_file()
    assert sfkt("evaluate", "--run", "made", "--method", "shott") == 1
    assert sfkt("evaluate", "--run", "made", "--method", "socket") == 1
    assert "first run `sfkt transfer --method socket" in " ".join(capsys.readouterr().err.split())


def test_bridge_runs_source_first_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sfkt("prepare", "synthetic", "--config", tiny(), "--run", "elsewhere") == 0
    capsys.readouterr()
    assert sfkt("bridge") == 0
    assert "`sfkt source` runs first" in capsys.readouterr().err
    assert Run(Path("elsewhere")).finished("source")
    used = yaml.safe_load(Path("elsewhere/bridge/config.yaml").read_text())
    assert used["bridge"]["width"] == 4  # from the settings that prepare was given


def prepared_without_source() -> Path:
    """A prepared run whose source.h5 is gone; the model that was trained on it lies elsewhere."""
    assert sfkt("prepare", "synthetic", "--config", tiny()) == 0
    assert sfkt("source") == 0
    own = Path("runs/synthetic/source").rename("own")
    Path("runs/synthetic/prepare/source.h5").unlink()
    return own


@pytest.mark.parametrize("brought", [False, True])
def test_what_the_source_model_was_made_from_may_be_deleted(
    brought: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sfkt("prepare", "synthetic", "--config", tiny()) == 0
    assert sfkt("source") == 0
    made_from = Path("runs/synthetic/prepare/source.h5")
    if brought:
        made_from = Path("runs/synthetic/source").rename("own")
        assert sfkt("source", "--set", f"source.checkpoint={made_from}") == 0
    shutil.rmtree(made_from) if brought else made_from.unlink()
    before = Path("runs/synthetic/source/done.json").read_bytes()
    capsys.readouterr()
    assert sfkt("source") == 0
    assert "already done" in capsys.readouterr().err
    assert sfkt("source", "--set", "source.width=8") == 1
    assert "source.width: was 4, now 8" in capsys.readouterr().err
    assert sfkt("source", "--force") == 1
    assert "does not exist" in capsys.readouterr().err
    assert Path("runs/synthetic/source/done.json").read_bytes() == before


def test_a_model_of_ones_own_needs_no_source_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = prepared_without_source()
    capsys.readouterr()
    assert sfkt("source") == 1
    assert "source.checkpoint" in capsys.readouterr().err
    assert sfkt("bridge", "--set", f"source.checkpoint={own}") == 0
    made = Path("runs/synthetic/source")
    assert (made / "model.safetensors").read_bytes() == (own / "model.safetensors").read_bytes()
    assert json.loads((made / "done.json").read_text())["ti_rgb_histogram"]


def test_several_models_of_ones_own_need_no_source_data(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = prepared_without_source()
    mixture = f"source.mixture=[{own}, {own}]"
    capsys.readouterr()
    assert sfkt("bridge", "--dry-run", "--set", mixture) == 0
    told = capsys.readouterr().err
    assert "`sfkt source` would run first" in told
    assert "puts the models of own, own side by side" in told
    assert sfkt("bridge", "--set", mixture) == 0
    assert "`sfkt source` runs first" in capsys.readouterr().err
    assert Run(Path("runs/synthetic")).finished("bridge")


def test_flag_beats_set_beats_file_beats_run_beats_default() -> None:
    Path("file.yaml").write_text("seed: 2\nbridge: {epochs: 2}\nsource.epochs: 2\n")
    run = Run(Path("runs/synthetic"))
    before = {"seed": 1, "bridge": {"epochs": 1}, "source": {"epochs": 1}, "image_size": 64,
              "training": {"clip_norm": 5.0, "flip": True}}  # fmt: skip
    run.path("prepare").mkdir(parents=True)
    write_record(run.path("prepare", "done.json"), {"stage": "prepare"})
    write_settings(run.path("prepare", "config.yaml"), yaml.safe_dump(before))
    settings = resolve(
        Options(
            run=run.folder,
            config=Path("file.yaml"),
            assignments=["seed=3", "bridge={epochs: 3}", "training.clip_norm=null"],
            seed=4,
            flags={"transfer.method": None},
        ),
        "bridge",
    )
    found = {row["name"]: (row["origin"], row["value"]) for row in origins(settings)}
    assert (
        found.items()
        >= {
            "seed": ("flag", 4),
            "bridge.epochs": ("--set", 3),
            "source.epochs": ("file.yaml", 2),
            "image_size": ("runs/synthetic", 64),
            "training.clip_norm": ("--set", None),
            "training.flip": ("default", True),
            "transfer.epochs": ("default", Config().transfer.epochs),
        }.items()
    )


def test_a_file_of_settings_that_is_a_pipe_is_read_once() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"bridge.epochs: 7\n")
    os.close(writer)
    options = Options(run=Path("absent"), config=Path(f"/dev/fd/{reader}"))
    for same in (options, replace(options, force=True), options.with_flags({"seed": 1})):
        assert resolve(same, "bridge", new_run=True).config.bridge.epochs == 7
    os.close(reader)


def test_a_run_of_that_name_is_told_from_a_file_that_was_not_given() -> None:
    prepared_by({"seed": 5}, Path("None"))
    assert resolve(Options(run=Path("None")), "bridge").config.seed == 5


def prepared_by(used: dict[str, Any], run: Path) -> None:
    """A run that was prepared with some settings."""
    (run / "prepare").mkdir(parents=True)
    write_record(run / "prepare/done.json", {"stage": "prepare"})
    write_settings(run / "prepare/config.yaml", yaml.safe_dump(used))


def test_another_data_set_does_not_get_the_settings_of_the_one_before() -> None:
    used = {"dataset": "folders", "image_size": 32, "prepare": {"root": "mine", "fit": "squash"},
            "classes": {"tr": ["cup"]}, "folders": {"unit": "m"}}  # fmt: skip
    prepared_by(used, Path("r"))
    for dataset, root in (("folders", Path("mine")), ("rgb-nir", None)):
        typed = Options(run=Path("r"), force=True, flags={"dataset": dataset})
        config = resolve(typed, "prepare", new_run=True).config
        assert config.prepare.root == root
        assert config.classes.tr == (("cup",) if root else ())
        assert config.folders.unit == ("m" if root else "auto")
        assert (config.image_size, config.prepare.fit) == (32, "squash")


def test_a_method_has_the_settings_that_it_was_trained_with() -> None:
    prepared_by({"seed": 5}, Path("r"))
    for name, seed in (("tgkt", 6), ("shot", 7)):
        folder = Path("r/transfer", name)
        folder.mkdir(parents=True)
        write_record(folder / "done.json", {"stage": f"transfer/{name}"})
        write_settings(folder / "config.yaml", f"seed: {seed}\n")
    for name, seed in (("tgkt", 6), ("shot", 7)):
        options = Options(run=Path("r"), flags={"transfer.method": name})
        assert resolve(options, "transfer").config.seed == seed


def test_the_run_used_last_may_have_any_name() -> None:
    run = Run(Path(os.fsdecode(b"runs/caf\xe9")))
    remember_run(run)
    assert find_run(Options(), None, new_run=False) == run


def test_a_wrong_value_is_told_with_the_place_that_it_came_from() -> None:
    Path("file.yaml").write_text("bridge: {epochs: 0, width: 1}\nsource.epochs: -1\nseed: -1\n")
    run = Run(Path("runs/synthetic"))
    run.path("prepare").mkdir(parents=True)
    write_record(run.path("prepare", "done.json"), {"stage": "prepare"})
    write_settings(run.path("prepare", "config.yaml"), "image_size: 5\nbridge: {width: 1}\n")
    options = Options(run.folder, Path("file.yaml"), ["bridge.epochs=0", "classes.tr=[1]"], seed=-1)
    with pytest.raises(ConfigError) as caught:
        resolve(options, "bridge")
    lines = [line.partition(" = ")[0].strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(lines) == [
        "file.yaml: setting bridge.width", "file.yaml: setting source.epochs",
        "runs/synthetic: setting image_size", "setting bridge.epochs", "setting classes.tr.0",
        "setting seed",
    ]  # fmt: skip


def test_settings_of_the_data_that_come_too_late_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepared = Path("runs/folders/prepare")
    prepared.mkdir(parents=True)
    write_record(prepared / "done.json", {"stage": "prepare"})
    used = {"dataset": "folders", "image_size": 32, "seed": 1, "folders": {"missing": [65535.0]}}
    write_settings(prepared / "config.yaml", yaml.safe_dump(used))
    Path("mine.yaml").write_text("dataset: folders\nimage_size: 32\nfolders: {missing: [65535]}\n")
    options = Options(run=prepared.parent, config=Path("mine.yaml"), seed=2)
    resolve_and_remember("predict", options)
    assert not capsys.readouterr().err
    late = replace(options, assignments=["folders.missing=[]", "prepare.workers=1"])
    resolve_and_remember("export", late)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("warning") == 1
    assert "folders.missing = [] has no effect here" in told
    assert "made with [65535.0], and only `sfkt prepare --force` uses it" in told


def test_only_the_stage_that_is_forced_starts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(Path("runs/synthetic"))
    for stage in ("prepare", "transfer/tgkt"):  # both were killed
        run.path(stage, "checkpoint").mkdir(parents=True)
        write_settings(run.path(stage, "config.yaml"), "dataset: synthetic\n")
    Path("runs/current").write_text("runs/synthetic\n")
    assert sfkt("export", "--force") == 1
    assert sfkt("bridge", "--force", "--set", "dataset=synthetic") == 1
    assert "starts from scratch" not in capsys.readouterr().err


def test_the_run_used_last_is_left_for_another_data_set() -> None:
    for name in ("mine", "nyu-depth"):
        dataset = "synthetic" if name == "mine" else name
        Path(f"runs/{name}/prepare").mkdir(parents=True)
        prepared = Path(f"runs/{name}/prepare")
        write_record(prepared / "done.json", {"stage": "prepare"})
        write_settings(prepared / "config.yaml", f"dataset: {dataset}\n")
    Path("runs/current").write_text("runs/mine\n")
    assert resolve(Options(), "bridge").run.folder == Path("runs/mine")
    for dataset, folder in (("synthetic", "runs/mine"), ("nyu-depth", "runs/nyu-depth")):
        options = Options(assignments=[f"dataset={dataset}"])
        assert resolve(options, "bridge").run.folder == Path(folder)


def test_the_demo_is_told_from_the_run_used_last(capsys: pytest.CaptureFixture[str]) -> None:
    folders(Path("data"))
    Path("runs/mine/prepare").mkdir(parents=True)
    write_record(Path("runs/mine/prepare/done.json"), {"stage": "prepare", "settings": {}})
    write_settings(Path("runs/mine/prepare/config.yaml"), "dataset: folders\nprepare: {root: data}")
    remember_run(Run(Path("runs/mine")))
    assert sfkt("classes") == 0
    assert "\tpot" in capsys.readouterr().out
    Path("runs/synthetic").touch()  # nothing can be written there
    for more, told in (((), True), (("--set", "dataset=synthetic"), False)):
        assert sfkt("run", *more) == 1
        assert ("add --run runs/mine" in capsys.readouterr().err) == told


def test_paths_of_options_may_begin_at_home(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(Path.cwd()))
    Path("mine.yaml").write_text("seed: -7\n")
    assert sfkt("config", "show", "--config=~/mine.yaml") == 1
    assert f"{Path.cwd() / 'mine.yaml'}: setting seed = -7" in capsys.readouterr().err
    assert sfkt("bridge", "--run=~/runs/a", "--set=seed=1") == 1
    assert f"{Path.cwd()}/runs/a/prepare is missing" in capsys.readouterr().err


def test_a_closed_standard_input_is_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert sfkt("prepare", "nyu-depth", "--download") == 1
    assert "--accept-licence" in capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["synthetic", "sun-rgbd", "folders"])
def test_config_init_writes_the_defaults(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sfkt("config", "init", dataset) == 0
    text = capsys.readouterr().out
    assert build(yaml.safe_load(text)) == build({"dataset": dataset})
    lines = text.splitlines()
    settings = [number for number, line in enumerate(lines) if line and "#" not in line]
    assert all(lines[number - 1].lstrip().startswith("#") for number in settings)
    Path("file.yaml").write_text(text)
    assert sfkt("config", "check", "file.yaml") == 0


def test_a_start_from_scratch_says_once_what_it_forgets(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unfinished = Path("runs/one/transfer/tgkt")
    unfinished.mkdir(parents=True)
    write_settings(unfinished / "config.yaml", yaml.safe_dump({"seed": 1}))
    assert sfkt("transfer", "--run", "runs/one", "--force") == 1
    assert capsys.readouterr().err.count("forgets the settings of its unfinished start") == 1


def test_config_check_names_all_problems_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("wrong.yaml").write_text("brigde: {epochs: 3}\nseed: 1.5\ntransfer: {epochs: 0}\n")
    assert sfkt("config", "check", "wrong.yaml") == 1
    said = capsys.readouterr().err
    assert all(name in said for name in ("brigde", "seed = 1.5", "transfer.epochs = 0"))
    Path("method.yaml").write_text("transfer.method: sock\nseeds: 1\n")
    assert sfkt("config", "check", "method.yaml") == 1
    said = capsys.readouterr().err
    assert "did you mean socket?" in said
    assert "did you mean seed?" in said


def test_config_show_and_schema_cover_every_setting(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sfkt("config", "show", "--set", "bridge.epochs=7") == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "bridge.epochs" in line]
    assert line.split() == ["bridge.epochs", "=", "7", "#", "--set"]
    assert sfkt("config", "show", "--run", "misspelled") == 0
    assert "misspelled does not exist" in capsys.readouterr().err
    assert sfkt("config", "schema") == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields)


def test_the_shell_completes_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, expected in (
        ("transfer --method so", {"socket", "socket+bridge"}),
        ("prepare rgb", {"rgb-nir"}),
        ("bridge --set bridge.alpha_f", {"bridge.alpha_f="}),
    ):
        monkeypatch.setenv("_SFKT_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", f"sfkt {typed}")
        monkeypatch.setenv("COMP_CWORD", str(len(typed.split())))
        result = CliRunner().invoke(app, [], prog_name="sfkt")
        assert set(result.output.split()) == expected


def test_classes_and_inspect_show_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert sfkt("classes", "synthetic", "--set", "synthetic.pairs=120") == 0
    assert "\tsphere" in capsys.readouterr().out
    assert sfkt("prepare", "synthetic", "--config", tiny()) == 0
    capsys.readouterr()
    assert sfkt("inspect", "--verify") == 0
    assert "all checksums match" in capsys.readouterr().err
    store = Path("runs/synthetic/prepare/transfer.h5")
    for name in (str(store), "sheet.jpg"):
        assert sfkt("inspect", str(store), "--output", name) == 1
        assert "ends in .png" in capsys.readouterr().err
    assert sfkt("inspect", str(store), "--verify", "--output", "sheet.PNG") == 0
    for folder in (".", "/"):
        assert sfkt("inspect", folder) == 1
        assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("group", [[], ["config"]])
def test_every_line_of_the_help_is_whole_at_80_columns(group: list[str]) -> None:
    text = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"}).stdout
    assert "Commands:" in text
    assert "..." not in text.partition("Commands:")[2]
