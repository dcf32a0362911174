"""The house's rules that no other test would notice: imports point one way, and no file grows too long."""

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import REPOSITORY
from mutation import SUBJECTS


# Every room imports from those above it, and within itself.
ROOMS = [
    "configuration_tjepa",
    "layers_tjepa",
    "encoders_tjepa",
    "predictors_tjepa",
    "losses_tjepa",
    "modeling_tjepa",
    "data_collator_tjepa",
    "corpus",
    "training",
    "downstream",
    "__init__",
    "tools",
    "run_pretraining",
    "cli",
    "benchmarks",
    "docs",
]
# beyond the order: what a room must not know although it stands above it
FORBIDDEN = {
    "predictors_tjepa": {"encoders_tjepa"},
    "losses_tjepa": {"encoders_tjepa", "predictors_tjepa"},
    "data_collator_tjepa": {"__init__", "modeling_tjepa", "layers_tjepa", "encoders_tjepa", "predictors_tjepa"},
    "corpus": {"__init__", "modeling_tjepa", "layers_tjepa", "encoders_tjepa", "predictors_tjepa", "losses_tjepa"},
}
MAX_LINES = {"modeling_tjepa.py": 900}
TRACKED = subprocess.check_output(["git", "ls-files", "*.py"], cwd=REPOSITORY, text=True)
FILES = [Path(name) for name in TRACKED.split()]
SHIPPED = [path for path in FILES if path.parts[0] != "tests"]


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[Path]:
    """The package's own files that a file imports anywhere in it, relative to the root."""
    for node in ast.walk(ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Path("__init__.py") for alias in node.names if alias.name.split(".")[0] == "tjepa")
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "tjepa"):
            parents = path.parts[: len(path.parts) - node.level] if node.level else ()
            base = Path(*parents, *(node.module or "").split(".")[0 if node.level else 1 :])
            for alias in node.names:  # a module of a room, a name of a module, or a name of the package itself
                candidates = (base / f"{alias.name}.py", base.parent / f"{base.name}.py")
                yield next((module for module in candidates if module in FILES), base / "__init__.py")


def test_the_root_holds_ten_files():
    names = [path.stem for path in FILES if len(path.parts) == 1]
    assert sorted(names) == sorted(name for name in ROOMS if not (REPOSITORY / name).is_dir())


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_imports_point_one_way(path):
    here = room(path)
    for module in imported_modules(path):
        there = room(module)
        assert ROOMS.index(there) <= ROOMS.index(here), f"{path} imports {module}, which is a room below it"
        assert there not in FORBIDDEN.get(here, ()), f"{path} imports {module}, of which it must know nothing"
        if module.name.startswith("run_") and path != module:
            assert here in ("cli", "benchmarks"), f"{path} imports from the script {module}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_is_too_long(path):
    num_lines = len((REPOSITORY / path).read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_LINES.get(path.name, 600)


def test_the_page_names_what_is_there():
    page = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+\.(?:py|json|md|png))`", page):
        assert (REPOSITORY / name).is_file(), name
    hops = re.findall(r"`([\w/]+\.py)`: ((?:`[A-Za-z_.]+`(?:, )?)+)", page)
    for file, names in hops:
        tree = ast.walk(ast.parse((REPOSITORY / file).read_text(encoding="utf-8")))
        defined = {node.name for node in tree if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        assert set(re.findall(r"`([A-Za-z_]+)[`.]", names)) <= defined, file
    assert len(hops) > 10 and len(page.splitlines()) < 60  # one page


def test_the_mutation_run_names_files_that_exist():
    for file, *all_tests in SUBJECTS.values():
        paths = [word for tests in all_tests for word in shlex.split(tests) if word.startswith("tests/")]
        assert [path for path in [file, *paths] if not (REPOSITORY / path).exists()] == []
