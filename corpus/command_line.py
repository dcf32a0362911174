"""What every command does first and last: help and misspelled flags before torch is imported, and errors in one line.

Notable: help and names of flags come from a table, `flags.json`, because the dataclasses that define them cannot be
imported without torch and transformers, which take ten seconds. `python docs/write_flags.py` makes it from them, and a
test holds it equal to them.
"""

import argparse
import difflib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml


PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE / "configs"
FLAG_TABLE = Path(__file__).with_name("flags.json")
USER_ERROR = 2  # the exit code, which is argparse's own for a wrong flag


def wait_briefly() -> None:
    """
    How threads wait for each other, unless the environment says it; read when torch loads OpenMP. By default they spin
    for milliseconds, which costs a multiple of the work on cores that are not theirs alone: two runs, a container's
    share, a virtual machine, a laptop in use. Asleep at once, every small operator pays for waking them. So they spin
    for about as long as that takes, 20 microseconds, and then sleep.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for other runtimes than GNU's, which do not read the other one
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def answer_early(command: str) -> None:
    """
    Answers what needs none of the modules of a command, and returns if there is nothing to say: the help, and an error
    for an unknown flag or key, a YAML file that is not there, or an unknown preset. Where transformers is another
    version than the table was made with, whose flags may be others, flags and keys are left to the command.

    Args:
        command (`str`): a subcommand of `tjepa`; what it was given is in `sys.argv`.
    """
    wait_briefly()
    arguments = expand_homes(sys.argv[1:])
    debug = ["--debug"] * _take_debug(arguments)
    table = json.loads(FLAG_TABLE.read_text(encoding="utf-8"))
    names, presets, help_lines = (table["commands"][command][key] for key in ("names", "presets", "help"))
    if wants_help(arguments):
        with suppress(BrokenPipeError):  # a pager was closed
            print("\n".join(help_lines).replace(f"tjepa {command}", Path(sys.argv[0]).name, 1), flush=True)
        sys.exit()
    with errors_in_one_line():
        takes_yaml = "FILE.yaml" in help_lines[0]  # else it may be what is searched for
        paths, flags = find_configs(arguments) if takes_yaml else ([], arguments)
        flags = normalise(flags, names)
        if version("transformers") == table["transformers"]:
            check_names(flags, names)
            for path in paths:
                read_yaml(path, names)
        sys.argv[1:] = [*arguments[: len(paths)], *flags, *debug]  # in the one spelling that all parsers know
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name, allowed in presets.items():
            parser.add_argument(f"--{name}")
            value = getattr(parser.parse_known_args(flags)[0], name)
            if value is not None and value not in allowed and not Path(value).is_file():
                raise ValueError(f"--{name} {value} is neither a file nor one of the presets {', '.join(allowed)}.")


def available_cores() -> int:
    """The CPU cores that this process may use: what taskset, a container or SLURM left of the machine's."""
    from joblib import cpu_count  # of scikit-learn; a quarter of a second, which help need not take

    cores, allotted = cpu_count(), os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(allotted)) if allotted.isdecimal() and int(allotted) else cores


def wants_help(arguments: Iterable[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def expand_home(value: str) -> str:
    """`~` where a path begins with it, also behind a `=` and in a list; a shell does so with single paths alone."""
    return value if "://" in value else re.sub(r"(?<![^=,])~(?=/|$)", lambda _: os.path.expanduser("~"), value)


def expand_homes(arguments: list[str]) -> list[str]:
    """The same in flags and their values; what stands before them may be a text."""
    first = next((index for index, argument in enumerate(arguments) if argument.startswith("--")), len(arguments))
    return [*arguments[:first], *map(expand_home, arguments[first:])]


def is_yaml(argument: str) -> bool:
    return argument.endswith((".yaml", ".yml"))


def normalise(flags: list[str], names: list[str]) -> list[str]:
    """`--train-file=x` as `--train_file=x`; values stay as they are."""
    spellings = {name.replace("_", "-"): name for name in [*names, *(f"no_{name}" for name in names)]}
    normal = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        known = spellings.get(name[2:].replace("_", "-")) if name.startswith("--") else None
        normal.append(f"--{known}{equals}{value}" if known else flag)
    return normal


def check_names(flags: list[str], names: list[str]) -> None:
    """
    Raises:
        ValueError: for the first of the flags that is not one of the names, with the nearest that is.
    """
    for flag in flags:
        name = flag.partition("=")[0]
        spellings = {name[2:], name[2:].removeprefix("no_")}
        if name.startswith("--") and len(name) > 2 and spellings.isdisjoint([*names, "help"]):
            raise ValueError(f"There is no argument {name}.{_did_you_mean(name, [f'--{n}' for n in names])}")


def _did_you_mean(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def find_configs(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The YAML files that the arguments begin with, and the rest of them."""
    files = list(takewhile(is_yaml, arguments))
    return [find_config(file) for file in files], arguments[len(files) :]


def find_config(path: str) -> Path:
    """The file, or the config of that name which comes with this package, so that it is found from any folder.

    Raises:
        FileNotFoundError: If there is neither; it names the nearest and all configs there are.
    """
    if Path(path).is_file():
        return Path(path)
    name = Path(path).name
    if path in (name, f"configs/{name}") and (CONFIGS / name).is_file():
        return CONFIGS / name
    there = sorted(file.name for file in CONFIGS.glob("*.yaml"))
    raise FileNotFoundError(
        f"There is no file {path}.{_did_you_mean(name, there)} Configs that come with T-JEPA, to be named with or "
        f"without their folder: {', '.join(there)}."
    )


def read_yaml(path: Path, allowed: list[str]) -> dict[str, Any]:
    """
    The lines `name: value` of a file.

    Raises:
        ValueError: if it holds something else, or a name that is not allowed.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must consist of lines `name: value`, but holds {type(values).__name__}.")
    for name in values:
        if name not in allowed:
            hint = _did_you_mean(repr(name), list(map(repr, allowed)))
            raise ValueError(f"{path} has the unknown key {name!r}.{hint} --help lists the arguments.")
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = [expand_home(one) if isinstance(one, str) else one for one in value]
        elif isinstance(value, str):
            values[name] = expand_home(value)
    return values


def printable(text: str) -> str:
    """A text for a terminal: its control characters, which could do anything there, are shown as one sign."""
    return re.sub(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", "\ufffd", text)


def at_least_one(text: str) -> int:
    """A type for argparse: how many of something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number}; it must be at least 1")
    return number


# ---- the outermost frame of a command ----


def start(main: Callable[[], Any]) -> None:
    """Runs the `main` of a command that was started directly; an error of the user's ends in one line and exit code 2.

    An error of the user's is a ValueError or ImportError that this package raises, or an OSError from wherever. All
    others, and with `--debug` these, too, end with their traceback and exit code 1. (`--debug VALUE` is the flag of
    TrainingArguments.)
    """
    with errors_in_one_line():
        _take_debug(sys.argv)
        sys.argv[1:] = expand_homes(sys.argv[1:])
        main()


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What `start` does with errors, around any other part of a command."""
    debug = _take_debug(list(sys.argv))
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # a pager, or head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, ImportError, OSError) as error:
        message, file = _message_and_file(error)
        if debug or not (isinstance(error, OSError) or file.startswith(f"{PACKAGE}{os.sep}")):
            raise
        message = re.sub(r"\s*\n\s*", " ", message.strip()) or type(error).__name__  # names keep their spaces
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)


def first_line(error: BaseException) -> str:
    """What of another library's error stands in a message of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _take_debug(arguments: list[str]) -> bool:
    """Whether `--debug` is among the arguments without a value; it is then taken out."""
    for index, argument in enumerate(arguments):
        if argument == "--debug" and (index + 1 == len(arguments) or arguments[index + 1].startswith("-")):
            del arguments[index]
            return True
    return False


def _message_and_file(error: BaseException) -> tuple[str, str]:
    """What an error says, and where it was raised; of one in a worker of a DataLoader torch hands on the traceback."""
    message, file = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
    if re.match("Caught .* in DataLoader worker", message):
        files = re.findall(r'^  File "(.+)", line', message, flags=re.MULTILINE)
        parts = re.split(rf"^(?:\w+\.)*{type(error).__name__}(?:: |$)", message, flags=re.MULTILINE)
        message, file = parts[-1], files[-1]
    return message, os.path.realpath(file)
