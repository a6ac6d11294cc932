"""The shape of the program: imports point down, and only one stage may see each kind of label."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sfkt_cli"
LAYERS = {
    8: ("__main__", "cli", "dry_run", "pipeline"),
    7: ("benchmark",),
    6: ("launch", "rows", "stages", "student"),
    5: ("evaluation",),
    4: ("methods",),
    3: ("training",),
    2: ("losses", "models"),
    1: ("data", "distributed", "scores", "settings"),
    0: ("__init__", "console", "errors", "files", "machine"),
}
"""The modules and folders below sfkt_cli, by layer."""
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
WITHOUT_TORCH = (
    "cli",
    "console",
    "dry_run",
    "errors",
    "evaluation.figures",
    "evaluation.html",
    "evaluation.report",
    "machine",
    "methods",
    "pipeline",
    "scores",
    "settings.config",
    "settings.options",
    "settings.resolve",
    "settings.runs",
    "settings.stage",
)
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name below the package: ``stages.bridge``; ``stages`` for its ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@functools.cache
def trees() -> list[tuple[str, ast.Module]]:
    return [(module_name(path), ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES]


def imports(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Modules below the package that are imported anywhere, and the name taken from each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "sfkt_cli":
                    yield alias.name.removeprefix("sfkt_cli").lstrip(".") or "__init__", None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            parent = node.module or ""
            if parent.split(".")[0] == "sfkt_cli":
                below = parent.removeprefix("sfkt_cli").lstrip(".")
                for alias in node.names:
                    child = (PACKAGE / below.replace(".", "/") / alias.name).with_suffix("")
                    if child.is_dir() or child.with_suffix(".py").is_file():
                        yield f"{below}.{alias.name}".lstrip("."), None
                    else:
                        yield below or "__init__", alias.name


def strings(tree: ast.Module) -> Iterator[str]:
    """Texts in the code that are no docstrings and no comments."""
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in documentation:
            if isinstance(node.value, str):
                yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr


def test_every_module_has_a_layer() -> None:
    top = {module_name(path).split(".")[0] for path in MODULES}
    assert top == set(LAYER_OF), "add new modules to LAYERS, dropped ones take out"


def test_imports_point_down() -> None:
    upward = [
        f"{name} imports {imported}"
        for name, tree in trees()
        if name != "__init__"  # it hands out load_student, on demand
        for imported, _ in imports(tree)
        if LAYER_OF[imported.split(".")[0]] > LAYER_OF[name.split(".")[0]]
    ]
    assert not upward


def test_nobody_takes_private_names_of_another_module() -> None:
    taken = [
        f"{name} takes {imported}.{what}"
        for name, tree in trees()
        for imported, what in imports(tree)
        if what is not None and what.startswith("_") and what != "__version__"
    ]
    assert not taken


def test_the_command_line_starts_without_torch() -> None:
    names = ", ".join(f"sfkt_cli.{name}" for name in WITHOUT_TORCH)
    heavy = "{'torch', 'torchvision', 'h5py', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, {names}; print({heavy})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("file", "attribute", "openers", "others"),
    [
        (
            "source.h5",
            "source_store",
            {"stages.source"},
            # name, write it, look whether it exists
            {"settings.runs", "settings.stage", "data.ingest", "dry_run", "pipeline"},
        ),
        (
            "test.h5",
            "test_store",
            {"stages.evaluate"},
            {"settings.runs", "settings.stage", "data.ingest", "dry_run", "evaluation.sections"},
        ),
    ],
)
def test_only_one_stage_knows_where_labels_are(
    file: str, attribute: str, openers: set[str], others: set[str]
) -> None:
    naming = {
        name
        for name, tree in trees()
        if any(file in text or text == attribute for text in strings(tree))
    }
    assert openers <= naming
    assert naming <= openers | others
    opening = {
        name
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "open_store"
        and any(getattr(inner, "attr", "") == attribute for inner in ast.walk(node))
    }
    assert opening == openers


def test_only_evaluation_reads_target_labels() -> None:
    """Beside ``source`` and what ``evaluate`` is made of, ``inspect`` counts what was written."""
    reading = {
        name
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "labels"
    }
    assert reading == {"stages.source", "evaluation.labelled", "stages.inspect"}
    knowing = {name for name, imported in edges().items() if "evaluation.labelled" in imported}
    assert knowing <= {name for name in edges() if name.split(".")[0] == "evaluation"} | {
        "stages.evaluate"
    }
    for stage in ("bridge", "transfer", "predict", "export"):
        assert not reachable(f"stages.{stage}") & knowing
        assert not reachable(f"stages.{stage}") & {"evaluation.labelled", "stages.inspect"}


@functools.cache
def edges() -> dict[str, set[str]]:
    return {name: {imported for imported, _ in imports(tree)} for name, tree in trees()}


def reachable(start: str) -> set[str]:
    found, todo = {start}, [start]
    while todo:
        for name in edges().get(todo.pop(), set()) - found:
            found.add(name)
            todo.append(name)
    return found


def test_messages_name_no_file_that_an_installation_lacks() -> None:
    lacking = [
        f"{name}: {text}"
        for name, tree in trees()
        for text in strings(tree)
        if re.search(r"\b(docs|sample_configs|tests)/", text)
    ]
    assert not lacking


def test_every_module_and_public_function_has_a_docstring() -> None:
    missing = [name for name, tree in trees() if not ast.get_docstring(tree)]
    for name, tree in trees():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                missing += [] if ast.get_docstring(node) else [f"{name}.{node.name}"]
    assert not missing
