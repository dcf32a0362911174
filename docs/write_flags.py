"""Writes the table of every command's help and flags, from which `tjepa` answers before it imports torch, and the page
docs/flags.md.

python docs/write_flags.py
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import transformers

from tjepa.cli import COMMANDS
from tjepa.corpus.command_line import FLAG_TABLE
from tjepa.data_collator_tjepa import MASKING_PRESETS
from tjepa.training.flags import BOTH_WORK, FLAGS, WORKING, Rule


PRESETS = {"masking_strategies": list(MASKING_PRESETS)}
PAGE = """# Flags of `TrainingArguments`

The scripts take every flag of the Trainer. A flag that *works* does what transformers says; one that is
*refused* is an error in one line, before anything is read; one that *does not apply* has nothing to act on,
and a warning says so. The flags of this project are in the `--help` of each command.

This page is written by `python docs/write_flags.py`, and a test holds it equal to the
table that the scripts check.

These work in pretraining and in fine-tuning, and there is nothing more to say of them: {plain}.

| flag | pretraining | fine-tuning |
| --- | --- | --- |
{rows}
"""


def make_table() -> dict:
    """What `FLAG_TABLE` should hold: for each command the names of its flags, their presets, and the help as lines."""
    commands = {}
    for command, (module, _) in COMMANDS.items():
        if command == "adapt":  # has a help of its own, and the flags of pretrain
            continue
        parser = find_parser(command, module)
        names = [option[2:] for action in parser._actions for option in action.option_strings[:1] if option != "-h"]
        names = [name for name in names if not (name.startswith("no_") and name[3:] in names)]
        presets = {name: PRESETS[name] for name in names if name in PRESETS}
        commands[command] = {"names": names, "presets": presets, "help": parser.format_help().splitlines()}
    return {"transformers": transformers.__version__, "commands": commands}


def find_parser(command: str, module: str) -> argparse.ArgumentParser:
    """The parser that a command builds, caught where it would print its help."""
    found = []
    with (
        patch("sys.argv", [f"tjepa {command}", "--help"]),
        patch.dict("os.environ", {"COLUMNS": "80"}),
        patch.object(argparse.ArgumentParser, "print_help", lambda parser, file=None: found.append(parser)),
    ):
        try:
            import_module(f"tjepa.{module}").main()
        except SystemExit:
            return found[0]
    raise RuntimeError(f"tjepa {command} --help did not end after its help.")


def to_markdown() -> str:
    """The table as a page."""
    symbols = {"works": "works", "refused": "**refused**", "unused": "does not apply"}

    def cell(rule: Rule) -> str:
        text = symbols[rule.status]
        if rule.refused_values:
            text += ", but for " + ", ".join(f"`{value}`" for value in rule.refused_values)
        return f"{text}: {rule.reason}" if rule.reason else text

    rows = [
        f"| `{name}` | {cell(rules.pretraining)} | {cell(rules.finetuning)} |"
        for name, rules in FLAGS.items()
        if rules != BOTH_WORK
    ]
    return PAGE.format(plain=", ".join(f"`{name}`" for name in WORKING.split()), rows="\n".join(rows))


if __name__ == "__main__":
    FLAG_TABLE.write_text(json.dumps(make_table(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    Path(__file__).with_name("flags.md").write_text(to_markdown(), encoding="utf-8")
