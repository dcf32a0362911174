"""The command line of every script: an optional YAML file, then flags, which win.

Notable: what a user got wrong is said in one line, before anything is read or computed. `--name` and `--na-me` are the
same flag, no flag may be abbreviated, and the help shows this project's own flags only: those that
`transformers.TrainingArguments` brings along are documented there.
"""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from .command_line import check_names, find_configs, normalise, read_yaml, wants_help


TRAINING_ARGUMENTS_PAGE = (
    "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
)
JOINED = ("config_overrides",)  # several of them, from the YAML file and the command line, add up


def parse_arguments(
    dataclass_types: Any,
    arguments: list[str] | None = None,
    description: str | None = None,
    default_file: str | Path | None = None,
    default_unless: tuple[str, ...] = (),
) -> tuple:
    """Parses the command line, `[file.yaml ...] [--name value ...]`; what is on the command line wins over the files.

    A line `name: value` of a file means what `--name value` means, with the same conversions and errors. Of several
    files a later one wins. `config_overrides` of the command line, and of a later file, are added to those before.

    Args:
        dataclass_types (`type` or `list[type]`): The dataclasses to fill.
        arguments (`list[str]`, *optional*): What to parse, `sys.argv[1:]` by default.
        description (`str`, *optional*): What the command does; the first sentence opens its help.
        default_file (`str` or `Path`, *optional*): The YAML file to start from where none is given ...
        default_unless (`tuple[str, ...]`): ... unless one of these arguments is.

    Returns:
        `tuple`: One instance per dataclass, in their order.

    Raises:
        ValueError: If the file is not a list of `name: value` lines, a name in it or on the command line is not that
            of an argument, or the values do not fit each other.
        FileNotFoundError: If there is no such file, neither where it says nor among the configs that come with this
            package.
    """
    parser = _Parser(dataclass_types, description)
    flags = list(sys.argv[1:] if arguments is None else arguments)
    paths, flags = find_configs(flags)
    flags = normalise(flags, parser.names)
    if not paths and default_file is not None and not any(f.split("=")[0][2:] in default_unless for f in flags):
        paths = [Path(default_file)]
    if wants_help(flags):
        flags, paths = ["--help"], []
    check_names(flags, parser.names)

    from_file = []
    if paths:
        values = {}
        for path in paths:
            new = read_yaml(path, parser.names)
            check_kinds(path, new, parser)
            joined = {name: f"{values[name]},{new[name]}" for name in JOINED if values.get(name) and new.get(name)}
            values |= new | joined
        # Mappings, null and empty lists cannot be written as flags; as defaults they give way to those, too.
        scalars = {name: value for name, value in values.items() if isinstance(value, (str, int, float))}
        # YAML takes a bare no for false
        scalars |= {name: "no" for name in scalars if name.endswith("_strategy") and scalars[name] is False}
        lists = {name: value for name, value in values.items() if isinstance(value, list) and value}
        others = values.keys() - scalars.keys() - lists.keys()
        parser.set_defaults(**{name: values[name] for name in others})
        from_file = [f"--{name}={value}" for name, value in scalars.items()]
        for name, value in lists.items():
            from_file += [f"--{name}", *map(str, value)]
    try:
        *instances, left_over = parser.parse_args_into_dataclasses(
            from_file + flags, return_remaining_strings=True, look_for_args_file=False
        )
        if left_over:
            raise ValueError(
                f"{left_over[0]} belongs to no flag: put a value with spaces, or a glob for several files, in quotes."
            )
        return tuple(instances)
    except (ValueError, TypeError) as error:  # also from TrainingArguments, whose combinations of flags may not fit
        raise ValueError(str(error)) from error


def check_kinds(path: Path, values: dict[str, Any], parser: "_Parser") -> None:
    """
    Raises:
        ValueError: for a list, a mapping or a null where the argument is none.
    """
    for name, value in values.items():
        kind = parser.types[name]
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        kinds = {get_origin(kind) or kind for kind in kinds} - {Literal}
        if value is None and type(None) not in kinds and parser.get_default(name) is not None:
            raise ValueError(f"{path}: {name} has no value. Give it one, or leave the line out.")
        if not isinstance(value, (str, int, float, type(None), *kinds)):
            raise ValueError(f"{path}: {name} is {value!r}; it takes one value, as --{name} does.")


class _Join(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


class _Parser(HfArgumentParser):
    """An HfArgumentParser with a help that fits, one spelling of every flag and no abbreviations."""

    def __init__(self, dataclass_types: Any, description: str | None = None):
        types = dataclass_types if isinstance(dataclass_types, (list, tuple)) else [dataclass_types]
        self.titles, self.groups, self.names, self.types = {}, {}, [], {}
        for dataclass_type in types:
            own = _own_fields(dataclass_type)
            self.types |= get_type_hints(dataclass_type)
            for field in dataclasses.fields(dataclass_type):
                self.titles[field.name] = _title(dataclass_type) if field.name in own else None
                self.names.append(field.name)
        epilog = "A flag may also be written with dashes: --output-dir. --debug shows where an error came from."
        if None in self.titles.values():
            epilog += (
                " Every other argument of transformers.TrainingArguments is taken as well, for example --max_steps, "
                "--per_device_train_batch_size, --save_steps, --eval_strategy or --bf16: " + TRAINING_ARGUMENTS_PAGE
            )
        purpose = " ".join((description or "").split("\n\n")[0].split())
        super().__init__(
            types,
            usage="%(prog)s [FILE.yaml] [--name value ...]",
            description=f"{purpose} A YAML file of lines `name: value` may come first; flags win over it.",
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=6, width=110),
        )

    def add_argument(self, *flags: str, **kwargs) -> argparse.Action:
        name = flags[0].lstrip("-")
        if name not in self.titles:  # -h, and the --no_ forms of flags
            if name != "h":
                kwargs["help"] = argparse.SUPPRESS
            return super().add_argument(*flags, **kwargs)
        if name in JOINED:
            kwargs["action"] = _Join
        title = self.titles[name]
        if title is None:
            return super().add_argument(flags[0], **{**kwargs, "help": argparse.SUPPRESS})
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        text, default = kwargs.get("help") or "", kwargs.get("default")
        if default not in (None, "", False) and "efault:" not in text:
            kwargs["help"] = f"{text} Default: %(default)s."
        if kwargs.get("nargs") == "?":
            kwargs["metavar"] = "true|false"
        elif "choices" not in kwargs:
            kwargs["metavar"] = {int: "N", float: "X"}.get(kwargs.get("type"), "VALUE")
        return self.groups[title].add_argument(flags[0], **kwargs)


def _own_fields(dataclass_type: type) -> set[str]:
    """Names of the fields that this package defines, in the class itself or in a base class."""
    package = __name__.split(".")[0]
    classes = [base for base in dataclass_type.__mro__ if base.__module__.split(".")[0] in (package, "__main__")]
    if dataclass_type.__module__.startswith("transformers."):
        return set()
    return {name for base in classes or [dataclass_type] for name in base.__dict__.get("__annotations__", {})}


def _title(dataclass_type: type) -> str:
    """`BeforeAfterArguments` -> `before after`."""
    words = re.findall("[A-Z][a-z]*", dataclass_type.__name__.removesuffix("Arguments"))
    return " ".join(words).lower() or "arguments"
