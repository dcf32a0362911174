"""Writes the table of every command's help and flags, from which `tjepa` answers before it imports torch.

python docs/write_flags.py
"""

import argparse
import json
from importlib import import_module
from unittest.mock import patch

import transformers

from tjepa.cli import COMMANDS
from tjepa.corpus.command_line import FLAG_TABLE
from tjepa.data_collator_tjepa import MASKING_PRESETS


PRESETS = {"masking_strategies": list(MASKING_PRESETS)}


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


if __name__ == "__main__":
    FLAG_TABLE.write_text(json.dumps(make_table(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
