"""Every example of README, documentation, model card and docstrings: Python runs unattended, commands parse."""

import argparse
import importlib
import runpy
import sys

import numpy as np
import pytest
from snippets import (
    OF_OTHERS,
    Snippet,
    commands,
    docstring_snippets,
    is_run,
    markdown_snippets,
    run_python,
    script_and_flags,
)

from helpers import REPOSITORY, make_dataset
from hub_server import serve_hub
from tjepa import TJEPAForPreTraining, cli
from tjepa.training.arguments import PretrainingArguments


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
SOURCES = [path for path in sorted(REPOSITORY.glob("**/*.py")) if "tests" not in path.parts[-3:]]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))
EVERYTHING = {path.relative_to(REPOSITORY): list(markdown_snippets(path)) for path in PAGES}
EVERYTHING |= {path.relative_to(REPOSITORY): list(docstring_snippets(path)) for path in SOURCES}
PUBLISHED = ["README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
PUBLISHED += [path.name for path in REPOSITORY.glob("*_tjepa.py") if path.name != "data_collator_tjepa.py"]


def test_python_of_pages_and_model_card_runs_unattended(workspace):
    card = workspace / "runs" / "quickstart" / "README.md"
    snippets = [snippet for page in [*PAGES, card] for snippet in markdown_snippets(page)]
    snippets = [snippet for snippet in snippets if snippet.language == "python"]
    assert len(snippets) >= 12 and sum("me/stories" in snippet.source for snippet in snippets) >= 4
    with serve_hub({"hf_stand_in": "me"}) as hub:
        published = [path for path in (workspace / "runs" / "quickstart").iterdir() if path.name in PUBLISHED]
        files = {path.name: path.read_bytes() for path in published} | {".gitattributes": b""}
        files |= dict.fromkeys(("pictures/loss.png", "pictures/cosine.png", "pictures/map.png"), b"")
        hub.add("me/stories", dict(sorted(files.items())))  # the Hub lists them in order
        environment = {**hub.environment("hf_stand_in"), "HF_HOME": str(workspace / "hf"), "HF_HUB_OFFLINE": "0"}
        failures = run_python(snippets, workspace, environment)
    assert not failures, "\n\n".join(f"{where}: {why}" for where, why in failures.items())


# ---- docstrings ----


PYTHON_EXAMPLES = [(path, snippet) for path, found in EVERYTHING.items() for snippet in found if path.suffix == ".py"]
PYTHON_EXAMPLES = [(path, snippet) for path, snippet in PYTHON_EXAMPLES if snippet.language == "python"]


@pytest.mark.parametrize("path, snippet", PYTHON_EXAMPLES, ids=[snippet.where for _, snippet in PYTHON_EXAMPLES])
def test_python_of_docstrings_runs(path, snippet, tmp_path, monkeypatch, make_model):
    """With what its module imports and, for a Trainer, a tiny model, arguments and dataset."""
    from transformers import Trainer

    from tjepa.corpus.streams import DocumentDataset
    from tjepa.data_collator_tjepa import DataCollatorForTJEPA

    monkeypatch.chdir(REPOSITORY)
    if path.parts[:2] == ("downstream", "metrics"):
        import evaluate as module
    else:
        module = importlib.import_module("tjepa." + ".".join(path.with_suffix("").parts))
    names = {
        "model": make_model(),
        "args": PretrainingArguments(str(tmp_path), max_steps=1, report_to="none", save_strategy="no"),
        "dataset": make_dataset().dataset,
        "embeddings": np.random.default_rng(0).normal(size=(20, 4)),
        "evaluate": module,
    }
    names |= {cls.__name__: cls for cls in (Trainer, DocumentDataset, DataCollatorForTJEPA, TJEPAForPreTraining)}
    exec(snippet.source, {**names, **vars(module)})


# ---- commands ----


class Parsed(Exception):
    pass


def parse_only(function):
    def parse(*args, **kwargs):
        function(*args, **kwargs)
        raise Parsed

    return parse


@pytest.fixture
def stops_after_parsing(monkeypatch):
    """Every command ends as soon as its flags were accepted."""
    for module in (
        "corpus.prepare_dataset",
        "corpus.train_tokenizer",
        "run_pretraining",
        "downstream.run_probing",
        "downstream.finetuning",
    ):
        module = importlib.import_module(f"tjepa.{module}")
        monkeypatch.setattr(module, "parse_arguments", parse_only(module.parse_arguments))
    real = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only(real))


BASH = [(path, snippet) for path, found in EVERYTHING.items() for snippet in found if snippet.language == "bash"]
BASH = [
    (path, snippet) for path, snippet in BASH if path.suffix != ".md" or not is_run(snippet)
]  # test_commands.py runs those
for config in CONFIGS:  # their opening comments
    indented = [line[2:].strip() for line in config.read_text().splitlines() if line.startswith("#   ")]
    BASH += [(config.relative_to(REPOSITORY), Snippet(config.name, "bash", "\n".join(indented)))]


@pytest.mark.parametrize("path, snippet", BASH, ids=[f"{path}-{snippet.where}" for path, snippet in BASH])
def test_commands_parse(path, snippet, stops_after_parsing, monkeypatch, tmp_path):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr("reporting.DATA", tmp_path)
    (tmp_path / "books-train.parquet").touch()
    for words in commands(snippet.source):
        started = script_and_flags(words)
        if started is None:
            assert words[0] in OF_OTHERS, words
            missing = [word for word in words if word.startswith("tests/") and not (REPOSITORY / word).exists()]
            assert not missing, words
            continue
        script, flags = started
        if (REPOSITORY / script).is_file() and "parse_args(" not in (REPOSITORY / script).read_text():
            if script != "run_pretraining.py":
                continue  # it has no flags
        flags = [flag for flag in flags if flag != "..."]
        monkeypatch.setattr(sys, "argv", [script, *flags])
        with pytest.raises(SystemExit if "--help" in flags else Parsed) as end:
            if script.startswith("tjepa ") or script in ("run_pretraining.py", "tjepa.run_pretraining"):
                name = script.split()[-1]
                module = "run_pretraining" if "run_pretraining" in name else cli.COMMANDS[name][0]
                importlib.import_module(f"tjepa.{module}").main()
            elif script.startswith("tjepa."):
                importlib.import_module(script).main()
                raise Parsed  # it has no flags and ran to its end
            else:
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")
        assert getattr(end.value, "code", 0) == 0
