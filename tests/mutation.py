"""A mutation run: are the tests red when the code is wrong?

    python tests/mutation.py --output mutants.json

breaks the code at places drawn by a fixed seed, one token at a time (Cosmic Ray's operators), and runs the tests that
guard it: first the quick ones, then for what survives these the wide ones. It works in a copy of the tracked files.
The libraries are imported once, and tests run in forks of that process, because imports would take most of the time.
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
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[1]
MEMORY_LIMIT = 24 * 2**30  # bytes of address space: a mutant may ask for any amount
LEAST = 12  # mutants of each subject
NONSENSE = ("VariableReplacer", "VariableInserter", "RemoveDecorator")  # names at random; decorators that register
# what is broken, and the arguments of pytest for the quick and for the wide tests of it
SUBJECTS = {
    "collator": (
        "data_collator_tjepa.py",
        "tests/test_masking.py -k 'not workers and not context and not recurring'",
        "tests/test_masking.py tests/test_modeling.py tests/test_performance_guard.py tests/test_objectives.py "
        "-k 'context or recurring or packed_equals or empty or plain or host or in_place'",
    ),
    "losses": (
        "losses_tjepa.py",
        "tests/test_objectives.py tests/test_learning_options.py tests/test_modeling.py "
        "-k 'objectives or sigreg or losses or variance or strategies'",
        "tests/test_modeling.py tests/training/test_trainer.py tests/docs/test_minimal.py tests/tools "
        "-k 'packed_equals or bfloat16 or health or minimal or reference'",
    ),
    "attention": (
        "layers_tjepa.py",
        "tests/test_layers.py tests/test_modeling.py -k 'layers or packed_equals or agree or flash or rotary'",
        "tests/test_modeling.py tests/test_performance_guard.py tests/tools "
        "-k 'not packed_equals and not agree and not browser'",
    ),
    "ema": (
        "training/ema.py",
        "tests/test_learning_options.py tests/training/test_trainer.py -k 'moving or momentum or golden'",
        "tests/training/test_trainer.py tests/training/test_extending.py",
    ),
    "schedules": (
        "training/schedules.py",
        "tests/training/test_trainer.py tests/training/test_other_encoders.py "
        "-k 'rates or said or golden or groups or schedule or heads'",
        "tests/training/test_trainer.py tests/training/test_extending.py tests/training/test_loading.py",
    ),
    "checkpoints": (
        "training/checkpoints.py",
        "tests/training/test_checkpoints.py -k 'not killed and not signal'",
        "tests/training/test_faults.py tests/training/test_extending.py tests/training/test_resume.py",
    ),
    "labels": (
        "downstream/labels.py",
        "tests/downstream/test_labels.py tests/downstream/test_run_classification.py "
        "-k 'test_labels or class_labels or found_out or asked_about'",
        "tests/downstream/test_run_classification.py tests/downstream/test_run_token_classification.py "
        "tests/downstream/test_predictions.py",
    ),
}


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
    for name in operator_names():
        kind = name.split("/")[1]
        if kind in NONSENSE or (kind.endswith(("_Is", "_IsNot")) and not kind.endswith(("IsNot_Is", "Is_IsNot"))):
            continue  # `==` -> `is`, too
        operator = get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(places):
            if not any(first <= start < last for first, last in annotations):
                mutants.setdefault((start, end), []).append((name, occurrence))
    return mutants


def mutate(mutant: dict) -> tuple[str, str]:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = Path(SUBJECTS[mutant["subject"]][0]).read_text(encoding="utf-8")
    return source, mutate_code(source, get_operator(mutant["operator"])(), mutant["occurrence"])


def draw(num_mutants: int, seed: int) -> list[dict]:
    """At most one mutant for each place; subjects in proportion to their places, but `LEAST` of each."""
    found = {name: find_mutants(Path(file).read_text(encoding="utf-8")) for name, (file, *_) in SUBJECTS.items()}
    num_places, drawn = sum(map(len, found.values())), []
    for name, mutants in found.items():
        rng = random.Random(f"{seed} {name}")
        share = max(LEAST, round(num_mutants * len(mutants) / num_places))
        for place in sorted(rng.sample(sorted(mutants), min(share, len(mutants)))):
            operator, occurrence = rng.choice(mutants[place])
            mutant = {"subject": name, "line": place[0][0], "operator": operator, "occurrence": occurrence}
            with contextlib.suppress(SyntaxError):  # which needs no test
                ast.parse(mutate(mutant)[1])
                drawn.append(mutant)
    return drawn


def prepare(folder: Path) -> None:
    """Copies the tracked files to `folder`/tjepa, goes there, and imports all libraries that tests need."""
    for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True).split("\0"):
        if name and (REPOSITORY / name).is_file():
            (folder / "tjepa" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, folder / "tjepa" / name)
    if (REPOSITORY.parent / "shared").is_dir():  # golden numbers, for tests that skip without
        (folder / "shared").symlink_to((REPOSITORY.parent / "shared").resolve())
    os.chdir(folder / "tjepa")
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # it is found by the second and the size of its source, which a mutant may share
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "CI": "1"}  # CI: hypothesis repeats
    command = [sys.executable, "-c", "import sys, pytest, hypothesis, helpers; print(*sys.modules)"]
    modules = subprocess.check_output(command, text=True, env={**os.environ, "PYTHONPATH": f"{folder}:tests"})
    for module in modules.split():
        if not module.startswith(("__main__", "tjepa", "helpers")):
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    gc.collect()
    gc.freeze()  # forks share what is there, and do not look through it again


def run_tests(arguments: str, timeout: float, log: Path) -> str:
    """`"green"`, `"red"` or `"timeout"`; pytest's output is in `log`."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1), os.dup2(file, 2)
            import pytest

            os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(arguments)])))
        finally:
            os._exit(70)
    deadline, pid, status = time.monotonic() + timeout, 0, 0
    while not pid and time.monotonic() < deadline:
        time.sleep(0.05)
        pid, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and whatever it started
    if not pid:
        os.waitpid(child, 0)
        return "timeout"
    return "green" if status == 0 else "red"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("mutants.json"), help="results, written after each mutant")
    parser.add_argument("--num", type=int, default=125, help=f"about so many mutants, and {LEAST} of each subject")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="earlier results: only their survivors, say after a new test")
    args = parser.parse_args()
    output, seconds = args.output.resolve(), {}
    if args.again:
        mutants = [m for m in json.loads(args.again.read_text())["mutants"] if m["outcome"] == "survived"]
    os.chdir(REPOSITORY)
    if not args.again:
        mutants = draw(args.num, args.seed)
    commit = subprocess.check_output(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, text=True).strip()
    print(f"{len(mutants)} mutants of {commit}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        prepare(Path(folder))
        for number, mutant in enumerate(mutants, start=1):
            file, *all_tests = SUBJECTS[mutant["subject"]]
            source, code = mutate(mutant)
            diff = difflib.unified_diff(source.splitlines(), code.splitlines(), file, file, "", "", 0, "")
            mutant |= {"outcome": "survived", "diff": "\n".join(diff)}
            for tests in all_tests:
                if tests not in seconds:
                    started = time.monotonic()
                    if run_tests(tests, 1800, log) != "green":
                        sys.exit(f"Red before any mutation: pytest {tests}\n{log.read_text()}")
                    seconds[tests] = time.monotonic() - started
                Path(file).write_text(code, encoding="utf-8")
                result = run_tests(tests, 30 + 4 * seconds[tests], log)
                Path(file).write_text(source, encoding="utf-8")
                if result != "green":
                    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text(errors="replace"), re.MULTILINE)
                    mutant |= {"outcome": "killed", "by": "".join(failed[:1]) or result}
                    break
            output.write_text(json.dumps({"commit": commit, "mutants": mutants[:number]}, indent=1) + "\n")
            print(f"{number}/{len(mutants)}", *(mutant[key] for key in ("subject", "line", "outcome")), flush=True)
            if mutant["outcome"] == "survived":
                print(mutant["diff"], flush=True)
    for name in SUBJECTS:
        outcomes = [mutant["outcome"] for mutant in mutants if mutant["subject"] == name]
        print(f"{name}: {outcomes.count('killed')} of {len(outcomes)} killed")


if __name__ == "__main__":
    main()
