"""A mutation run: are the tests red when the code is wrong?

    python tests/mutation.py --output runs/mutants.json

breaks the code at places drawn by a fixed seed, one token at a time (Cosmic Ray's operators), and runs the tests that
guard it: first the quick ones, then for what survives these the wide ones. Works in a copy of the tracked files. The
libraries are imported once, and every mutant runs in a fork of that process, because imports would take most of the
time. `docs/mutants.md` has figures, and the survivors with reasons.
"""

import argparse
import ast
import contextlib
import difflib
import gc
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
MEMORY_LIMIT = 24 * 2**30  # bytes of address space: a mutant may ask for any amount

MASKING, MODELING, OPTIONS = "tests/test_masking.py", "tests/test_modeling.py", "tests/test_learning_options.py"
TRAINER, CHECKPOINTS = "tests/training/test_trainer.py", "tests/training/test_checkpoints.py"
CLASSIFICATION = "tests/downstream/test_run_classification.py"


@dataclass(frozen=True)
class Subject:
    """A file to break, and the arguments of pytest for the tests that see most mutants, and for the others."""

    file: str
    quick: tuple[str, ...]
    wide: tuple[str, ...]


SUBJECTS = {
    "collator": Subject(
        "data_collator_tjepa.py",
        ("tests/test_masking.py", "-k", "not workers"),
        (
            MODELING,
            "tests/test_performance_guard.py",
            "-k",
            "packed_equals or empty or padding or plain",
        ),
    ),
    "losses": Subject(
        "losses_tjepa.py",
        (OPTIONS, MODELING, "-k", "loss or sigreg or strategies or packed_equals"),
        (OPTIONS, TRAINER, "tests/docs/test_minimal.py", "tests/tools"),
    ),
    "attention": Subject(
        "layers_tjepa.py",
        (MODELING, "-k", "not compiled and not folder and not configurations"),
        (MODELING, "tests/test_performance_guard.py", "tests/tools", "-k", "compiled or host or plain or tools"),
    ),
    "ema": Subject(
        "training/ema.py",
        (TRAINER, OPTIONS, "-k", "moving or momentum or golden"),
        (TRAINER, OPTIONS, "tests/training/test_flags.py"),
    ),
    "schedules": Subject(
        "training/schedules.py",
        (TRAINER, "-k", "rates or said or golden or groups or schedule"),
        (TRAINER, "tests/training/test_flags.py", "tests/training/test_resume.py"),
    ),
    "checkpoints": Subject(
        "training/checkpoints.py",
        (CHECKPOINTS, "-k", "not killed and not signal"),
        ("tests/training/test_flags.py", "tests/training/test_loading.py", "tests/training/test_resume.py"),
    ),
    "labels": Subject(
        "downstream/labels.py",
        ("tests/downstream/test_labels.py", CLASSIFICATION, "-k", "labels or found_out or asked_about"),
        (CLASSIFICATION, "tests/downstream/test_run_token_classification.py", "tests/downstream/test_predictions.py"),
    ),
}


def makes_sense(operator: str) -> bool:
    """Without operators that rename at random, and without `==` -> `is`."""
    name = operator.split("/")[1]
    if name in ("VariableReplacer", "VariableInserter", "RemoveDecorator"):
        return False
    return not name.endswith(("_Is", "_IsNot")) or name.endswith(("IsNot_Is", "Is_IsNot"))


def find_mutants(source: str) -> dict[tuple, list[tuple[str, int]]]:
    """Place ((line, column), (line, column)) -> the mutants there, as (operator, occurrence); no type annotations."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    annotations = []
    for node in ast.walk(ast.parse(source)):
        for child in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if child is not None:
                annotations.append(((child.lineno, child.col_offset), (child.end_lineno, child.end_col_offset)))
    mutants, nodes = {}, list(ast_nodes(get_ast(source)))
    for name in filter(makes_sense, operator_names()):
        operator = get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start < last for first, last in annotations):
                mutants.setdefault((start, end), []).append((name, occurrence))
    return mutants


def mutate(mutant: dict) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = (REPOSITORY / SUBJECTS[mutant["subject"]].file).read_text(encoding="utf-8")
    return mutate_code(source, get_operator(mutant["operator"])(), mutant["occurrence"])


def draw(num_mutants: int, least: int, seed: int) -> list[dict]:
    """At most one mutant for each place; subjects in proportion to their places, but `least` of each."""
    found = {name: find_mutants((REPOSITORY / s.file).read_text(encoding="utf-8")) for name, s in SUBJECTS.items()}
    num_places, drawn = sum(map(len, found.values())), []
    for name, mutants in found.items():
        rng = random.Random(f"{seed} {name}")
        share = max(least, round(num_mutants * len(mutants) / num_places))
        for place in sorted(rng.sample(sorted(mutants), min(share, len(mutants)))):
            operator, occurrence = rng.choice(mutants[place])
            mutant = {"subject": name, "line": place[0][0], "operator": operator, "occurrence": occurrence}
            with contextlib.suppress(SyntaxError):  # which no test has to find
                ast.parse(mutate(mutant))
                drawn.append(mutant)
    return drawn


def copy_tracked_files(target: Path) -> None:
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True).split("\0"):
        if name and (REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target / name)
    if (REPOSITORY.parent / "shared").is_dir():  # golden numbers, for tests that skip without
        (target.parent / "shared").symlink_to((REPOSITORY.parent / "shared").resolve())


def run_tests(arguments: tuple[str, ...], timeout: float, log: Path) -> str:
    """`"green"`, `"red"` or `"timeout"`; pytest's output is in `log`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        try:
            import pytest

            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *arguments])))
        finally:
            os._exit(70)
    deadline, status = time.monotonic() + timeout, None
    while status is None and time.monotonic() < deadline:
        pid, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if pid else time.sleep(0.05)
    try:
        os.killpg(child, signal.SIGKILL)  # whatever it started as well
    except ProcessLookupError:
        pass
    if status is None:
        os.waitpid(child, 0)
        return "timeout"
    return "green" if status == 0 else "red"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("mutants.json"), help="results, written after each mutant")
    parser.add_argument("--num", type=int, default=150, help="about so many mutants")
    parser.add_argument("--least", type=int, default=12, help="of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--again", type=Path, help="earlier results: only their survivors, say after a new test")
    args = parser.parse_args()
    if args.again:
        mutants = [m for m in json.loads(args.again.read_text())["mutants"] if m["outcome"] == "survived"]
    else:
        mutants = draw(args.num, args.least, args.seed)
    mutants = [mutant for mutant in mutants if mutant["subject"] in args.subjects]
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, text=True).strip()
    print(f"{len(mutants)} mutants of {commit}", flush=True)
    output = args.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "tjepa", Path(folder) / "log"
        copy_tracked_files(tree)
        os.chdir(tree)
        sys.path.insert(0, folder)
        # bytecode is found by the time in seconds and the size of its source, which a mutant may share
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}  # CI: hypothesis does not vary
        listing = "import helpers, pytest, hypothesis, sys; print(*(m for m in sys.modules if m[:5] not in OWN))"
        listing = listing.replace("OWN", "('tjepa', 'helpe', '__mai')")
        command = [sys.executable, "-c", listing]
        modules = subprocess.check_output(command, text=True, env={**os.environ, "PYTHONPATH": f"{folder}:tests"})
        for module in modules.split():
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        gc.collect()
        gc.freeze()  # the forks share what is there, and do not look through it again
        seconds = {}

        for number, mutant in enumerate(mutants, start=1):
            subject = SUBJECTS[mutant["subject"]]
            source = (tree / subject.file).read_text(encoding="utf-8")
            code = mutate(mutant)
            lines = difflib.unified_diff(source.splitlines(), code.splitlines(), subject.file, subject.file, "", "", 0)
            mutant |= {"diff": "\n".join(lines), "outcome": "survived"}
            started = time.monotonic()
            for which, tests in (("quick", subject.quick), ("wide", subject.wide)):
                if tests not in seconds:
                    seconds[tests] = time.monotonic()
                    if run_tests(tests, 1800, log) != "green":
                        sys.exit(f"{tests} fail on the code as it is:\n{log.read_text()}")
                    seconds[tests] = time.monotonic() - seconds[tests]
                    print(f"{seconds[tests]:.0f} s for {' '.join(tests)}", flush=True)
                (tree / subject.file).write_text(code, encoding="utf-8")
                result = run_tests(tests, 30 + 4 * seconds[tests], log)
                (tree / subject.file).write_text(source, encoding="utf-8")
                if result != "green":
                    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
                    mutant |= {"outcome": "killed", "by": f"{which} tests, {result}", "test": failed[:1]}
                    break
            mutant["seconds"] = round(time.monotonic() - started, 1)
            output.write_text(json.dumps({"commit": commit, "mutants": mutants[:number]}, indent=1) + "\n")
            by = mutant.get("by", "")
            print(f"{number}/{len(mutants)} {mutant['subject']}:{mutant['line']} {mutant['outcome']} {by}", flush=True)
            if mutant["outcome"] == "survived":
                print(mutant["diff"], flush=True)

    for name in args.subjects:
        outcomes = [mutant["outcome"] for mutant in mutants if mutant["subject"] == name]
        print(f"{name}: {outcomes.count('killed')} of {len(outcomes)} killed")


if __name__ == "__main__":
    main()
