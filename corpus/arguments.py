"""The command line of every script: an optional YAML file, then flags, which win."""

import difflib
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_arguments(dataclass_types: Any, arguments: list[str] | None = None) -> tuple:
    """Parses the command line, `[file.yaml] [--name value ...]`; what is on the command line wins over the file.

    A line `name: value` of the file means what `--name value` means, with the same conversions and errors.

    Args:
        dataclass_types (`type` or `list[type]`): The dataclasses to fill.
        arguments (`list[str]`, *optional*): What to parse, `sys.argv[1:]` by default.

    Returns:
        `tuple`: One instance per dataclass, in their order.

    Raises:
        ValueError: If the file is not a list of `name: value` lines, or has a name that is no argument.
    """
    parser = HfArgumentParser(dataclass_types)
    flags = list(sys.argv[1:] if arguments is None else arguments)
    if not flags or not flags[0].endswith((".yaml", ".yml")):
        return parser.parse_args_into_dataclasses(flags)

    path = flags.pop(0)
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must consist of lines `name: value`, but holds {type(values).__name__}.")
    allowed = [field.name for dataclass_type in parser.dataclass_types for field in fields(dataclass_type)]
    for name in values:
        if name not in allowed:
            close = difflib.get_close_matches(str(name), allowed, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path} has the unknown key {name!r}.{hint} Allowed are: {', '.join(sorted(allowed))}.")
    # Lists, mappings and null cannot be written as one flag; as defaults they also give way to the command line.
    scalars = {name: value for name, value in values.items() if isinstance(value, (str, int, float))}
    parser.set_defaults(**{name: value for name, value in values.items() if name not in scalars})
    return parser.parse_args_into_dataclasses([f"--{name}={value}" for name, value in scalars.items()] + flags)
