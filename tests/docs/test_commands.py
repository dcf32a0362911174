"""Every command of README and documentation is run, as small as it goes, unless its block says what it needs."""

import importlib
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from snippets import (
    INSTEAD_OF_DOCSTRINGS,
    MARKS,
    NEW_MODEL,
    OF_OTHERS,
    RUN_BY,
    SMALL,
    commands_of,
    script_and_flags,
)

from helpers import REPOSITORY
from tjepa import cli


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_is_unaccounted_for(page):
    for words in commands_of(page):
        started = script_and_flags(words)
        script = started[0] if started else words[0]
        if script in RUN_BY:
            assert Path(script).stem in (REPOSITORY / RUN_BY[script]).read_text(), f"{RUN_BY[script]}: {script}"
        else:
            assert script in SMALL or script in OF_OTHERS, (
                f"{page.name}: `{' '.join(words)}` is run by no test. Say in SMALL how it is run, in RUN_BY by which "
                f"test, or begin its block with {' or '.join(map(repr, MARKS))}."
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, workspace, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "workspace"
    shutil.copytree(workspace, folder, ignore=shutil.ignore_patterns("arrays"))  # which a command makes
    monkeypatch.chdir(folder)
    for words in commands_of(page):
        started = script_and_flags(words)
        if started is None or started[0] not in SMALL:
            continue
        script, flags = started
        if script == "tjepa export":
            shutil.rmtree(flags[1], ignore_errors=True)  # the workspace's own
        small = SMALL[script].split()
        if "pretrain" in script:
            is_prepared = any(flag.endswith("tinystories.yaml") for flag in flags)
            small += [] if is_prepared else ["--max_length", "32"]
            small += ["--output_dir", str(tmp_path / "run"), "--overwrite_output_dir"]
            small += [] if "--model_name_or_path" in flags else NEW_MODEL.split()
            if "--train_file" not in flags and not any(flag.endswith(".yaml") for flag in flags):
                small += INSTEAD_OF_DOCSTRINGS.split()
        monkeypatch.setattr(sys, "argv", [script, *flags, *small])
        if (folder / script).is_file():
            runpy.run_path(str(folder / script), run_name="__main__")
        else:
            name = script.split()[-1]
            module = cli.COMMANDS[name][0] if name in cli.COMMANDS else "run_pretraining"
            importlib.import_module(f"tjepa.{module}").main()
