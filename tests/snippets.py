"""Finds the examples that a reader would copy, in Markdown files and in docstrings, and runs or parses them."""

import ast
import builtins
import doctest
import faulthandler
import json
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from helpers import TINY
from tjepa.cli import adapt


COMMANDS = ("tjepa", "accelerate", "torchrun", "python")
NAMES_OF_THE_READER = {  # names that a snippet may use without making them: what makes them
    "tokenizer": "from transformers import AutoTokenizer\n"
    "tokenizer = AutoTokenizer.from_pretrained('runs/quickstart', trust_remote_code=True)",
    "encoder": "from transformers import AutoModel\n"
    "encoder = AutoModel.from_pretrained('runs/quickstart', trust_remote_code=True).eval()",
    "model": "from transformers import AutoModel\n"
    "model = AutoModel.from_pretrained('runs/quickstart', trust_remote_code=True)",
}


MARKS = ("# needs the network", "# needs a GPU")  # the first line of a block whose commands are parsed only
OF_OTHERS = (
    "pip",
    "uv",
    "git",
    "cd",
    "pytest",
    "ruff",
    "hf",
    "docker",
    "vllm",
    "mkdocs",
    "bash",
)  # they install, fetch, or run tests and scripts

# What makes a command small: flags that are added to those of the docs, and win over them.
SMALL_RUN = "--max_steps 1 --save_strategy no --logging_steps 1 --use_cpu --push_to_hub False"
SMALL_RUN += " --dataloader_num_workers 0"
SMALL = {
    "tjepa prepare": "--max_train_samples 40",
    "tjepa tokenizer": "--vocab_size 300",
    "tjepa pretrain": SMALL_RUN,
    "run_pretraining.py": SMALL_RUN,
    "tjepa classify": "--max_steps 1 --overwrite_output_dir",
    "tjepa tag": "--max_steps 1 --overwrite_output_dir",
    "tjepa probe": "--max_samples 40 --max_words 40 --num_seeds 1",
    "tjepa search": "--file texts.jsonl --model runs/quickstart",
    "tjepa fill": "--model runs/quickstart",
    "tjepa export": "--no_whitening",
    "tjepa publish": "--no_whitening --no_onnx --dry_run",
    "tjepa embed": "",
    "tjepa health": "",
    "tjepa report": "",
    "docs/plot_strategies.py": "",
    "docs/plot_architecture.py": "",
    "docs/plot_method.py": "",
    "docs/plot_health.py": "",
    "benchmarks/scaling_arithmetic.py": "",
    "benchmarks/attention_on_cpu.py": "--longest 64 --repeats 1",
    "benchmarks/encoder_throughput.py": "--hidden_size 32 --head_dim 16 --num_layers 1 --num_documents 4 --repeats 1",
}
NEW_MODEL = f"--config_overrides {TINY}"  # not of an encoder that is there
INSTEAD_OF_DOCSTRINGS = "--train_file stories.parquet --tokenizer_name my-tokenizer"
# What takes longer, and the test that runs it.
RUN_BY = {
    "benchmarks/adaptation.py": "tests/test_adaptation_benchmark.py",
    "benchmarks/collator_throughput.py": "tests/test_benchmarks.py",
    "benchmarks/embedding_speed.py": "tests/test_benchmarks.py",
    "benchmarks/encoder_families.py": "tests/test_benchmarks.py",
    "benchmarks/learning_curve.py": "tests/test_learning_curve.py",
    "benchmarks/pretraining_throughput.py": "tests/test_benchmarks.py",
    "benchmarks/scaling.py": "tests/test_benchmarks.py",
    "benchmarks/streaming_memory.py": "tests/corpus/test_streaming.py",
    "benchmarks/token_accuracy.py": "tests/test_benchmarks.py",
    "docs/minimal.py": "tests/docs/test_minimal.py",
    "tjepa demo": "tests/tools/test_demo.py",
    "tests/hub_server.py": "tests/docs/test_snippets.py",
    "tests/kill_and_resume.py": "tests/training/test_checkpoints.py",
    "tests/mutation.py": "tests/test_architecture.py",
}


class Snippet(NamedTuple):
    where: str  # file and line
    language: str  # python or bash
    source: str


def markdown_snippets(path: Path) -> Iterator[Snippet]:
    """Fenced blocks of Python and bash, and indented commands."""
    text = path.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(python|bash)\n(.*?)^```", text, flags=re.M | re.S):
        line = text[: match.start()].count("\n") + 1
        yield Snippet(f"{path.name}:{line}", match[1], match[2])
    without_fences = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    yield from _indented(without_fences, path.name)


def docstring_snippets(path: Path) -> Iterator[Snippet]:
    """Indented commands and indented Python in docstrings; formulas, which are neither, are passed over."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            docstring = ast.get_docstring(node) or ""
            yield from _indented(docstring, f"{path.name}:{getattr(node, 'name', '')}")


def _indented(text: str, where: str) -> Iterator[Snippet]:
    for block in re.findall(r"(?:^|\n\n)((?: {4}.*(?:\n|$))+)", text):
        source = re.sub(r"^ {4}", "", block, flags=re.M)
        if source.split()[0] in COMMANDS:
            yield Snippet(where, "bash", source)
        elif _is_python(source):
            yield Snippet(where, "python", source)


def _is_python(source: str) -> bool:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call) for node in ast.walk(tree))


# ---- bash ----


def is_marked(snippet: Snippet) -> bool:
    """Whether a block says that it needs what a test has not got."""
    return snippet.source.startswith(MARKS)


def commands_of(page: Path) -> list[list[str]]:
    """The commands of a page that are to be run."""
    blocks = [snippet for snippet in markdown_snippets(page) if snippet.language == "bash" and not is_marked(snippet)]
    return [words for snippet in blocks for words in commands(snippet.source)]


def is_run(snippet: Snippet) -> bool:
    """Whether every command of a block is run, so that it need not be parsed as well."""
    started = [script_and_flags(words) for words in commands(snippet.source)]
    return not is_marked(snippet) and all(found is not None and found[0] in SMALL for found in started)


def commands(source: str) -> Iterator[list[str]]:
    """The commands of a bash block as lists of words, with its variables filled in."""
    variables = {}
    for line in source.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            command = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), command)
            words = shlex.split(command, comments=True)
            if words and words[0] == "export":
                words = words[1:]
            while words and re.fullmatch(r"\w+=.*", words[0]):
                name, _, variables[name] = words.pop(0).partition("=")
            if words:
                yield words


def script_and_flags(words: list[str]) -> tuple[str, list[str]] | None:
    """What a command line starts: a subcommand of `tjepa`, or a file or module, and its flags; None for other tools.

    Raises:
        AssertionError: if a file that it names does not exist.
    """
    program, *rest = words
    if program == "tjepa" and rest[0] == "adapt":
        return "tjepa pretrain", adapt(rest)[1:]
    if program == "tjepa":
        return f"tjepa {rest[0]}", rest[1:]
    if program == "accelerate":
        assert rest.pop(0) == "launch"
    elif program not in ("torchrun", "python"):
        return None
    while rest and not rest[0].endswith(".py"):
        flag = rest.pop(0)
        assert flag.startswith("-"), words
        if flag == "-m":
            break
        if flag != "--debug":
            value = rest.pop(0)
            assert flag != "--config_file" or Path(value).is_file(), words
    script, *flags = rest
    return script, flags


# ---- python ----


def run_python(snippets: list[Snippet], folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """Runs the snippets in a process of their own, each in a namespace of its own, with `folder` as working directory.

    Returns:
        `dict[str, str]`: Where a snippet stands -> why it failed. Asking the user something is a failure.
    """
    (folder / "snippets.json").write_text(json.dumps(snippets))
    result = subprocess.run(
        [sys.executable, __file__, "snippets.json"],
        cwd=folder,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "failures.json").read_text())


def free_names(source: str) -> set[str]:
    names = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    made = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    return {node.id for node in names} - made


def _run_one(snippet: Snippet) -> None:
    asked = []
    builtins.input = lambda prompt="": asked.append(prompt) or "n"
    source = snippet.source
    examples = doctest.DocTestParser().get_examples(source)
    needed = free_names("".join(example.source for example in examples) if examples else source)
    namespace = {"__name__": "__main__"}
    for name in sorted(needed & set(NAMES_OF_THE_READER)):
        exec(NAMES_OF_THE_READER[name], namespace)
    if examples:
        test = doctest.DocTest(examples, namespace, snippet.where, None, None, source)
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        assert runner.run(test).failed == 0, "the output differs"
    else:
        exec(compile(source, snippet.where, "exec"), namespace)
    assert not asked, f"it asks: {asked}"


def _main(path: str) -> None:
    failures = {}
    snippets = [Snippet(*item) for item in json.loads(Path(path).read_text())]
    # Those that import this package come last: after it no folder of ours needs `trust_remote_code`.
    for snippet in sorted(snippets, key=lambda snippet: "tjepa" in snippet.source):
        faulthandler.dump_traceback_later(90, exit=True)  # a snippet that waits for something
        print(snippet.where, file=sys.stderr, flush=True)
        try:
            _run_one(snippet)
        except Exception:
            failures[snippet.where] = traceback.format_exc()
    Path("failures.json").write_text(json.dumps(failures))


if __name__ == "__main__":
    _main(sys.argv[1])
