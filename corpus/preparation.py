"""What a prepared folder carries of how it was made, and what may not contradict it.

`prepare_dataset` writes `preparation.json` beside the rows: its arguments, the counts, and a fingerprint of the
vocabulary that the token ids are of.
"""

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase


RECORD = "preparation.json"


def read_preparation(folder: str | Path | None) -> dict | None:
    """`preparation.json` of a folder, or `None` where there is none: arguments, counts, tokenizer fingerprint."""
    path = folder and Path(folder) / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else None


def write_preparation(folder: Path, arguments: dict, counts: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    record = {"arguments": arguments, "tokenizer_fingerprint": fingerprint(tokenizer), "counts": counts}
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hexadecimal digits that two tokenizers share if every id means the same token for both."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()[:16]


def settle_with_preparation(folder: str | None, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """
    The value of each argument: what was given, else that of the prepared folder, else the default.

    Args:
        folder (`str`, *optional*): the dataset's name, which may be a prepared folder.
        given (`dict`): argument -> value, `None` where it was left out.
        defaults (`dict`): argument -> value where neither says anything.

    Raises:
        ValueError: if an argument contradicts the folder; names the command that would prepare it that way.
    """
    record = read_preparation(folder) or {"arguments": {}}
    made_with = {name: value for name, value in record["arguments"].items() if value is not None}
    others = {k: value for k, value in given.items() if value is not None and value != made_with.get(k, value)}
    if others:
        before, now = (", ".join(f"--{name} {values[name]}" for name in others) for values in (made_with, others))
        raise ValueError(
            f"{folder} was prepared with {before}, so {now} can have no effect on it. Leave that out, also of a YAML "
            f"file, or prepare the documents again: {preparation_command(record, folder, **others)}"
        )
    fallback = {name: made_with.get(name, default) for name, default in defaults.items()}
    return {name: value if given[name] is None else given[name] for name, value in fallback.items()}


def check_vocabulary(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Refuses a tokenizer whose ids mean other tokens than those of the prepared folder. Further tokens may follow.

    Raises:
        ValueError: names the command that prepares the documents with this tokenizer.
    """
    record = read_preparation(folder)
    if record is None or record.get("tokenizer_fingerprint") == fingerprint(tokenizer):
        return
    made_with = AutoTokenizer.from_pretrained(folder)
    is_as_it_was = record.get("tokenizer_fingerprint") in (None, fingerprint(made_with))
    if is_as_it_was and made_with.get_vocab().items() <= tokenizer.get_vocab().items():
        return
    name = tokenizer.name_or_path or "TOKENIZER"
    raise ValueError(
        f"{folder} holds token ids of another vocabulary ({len(made_with):,} tokens, from "
        f"{record['arguments'].get('tokenizer_name')}) than that of {name} ({len(tokenizer):,} tokens). Leave "
        "--tokenizer_name and --model_name_or_path out, or prepare the documents again: "
        f"{preparation_command(record, folder, tokenizer_name=name)}"
    )


def preparation_command(record: dict, folder: str | Path, **changes: Any) -> str:
    """The command that a folder was prepared with, with some arguments changed, to put the result in its place."""
    arguments = {**record["arguments"], **changes, "output_dir": folder, "overwrite_output_dir": True}
    flags = [f"--{name}={value}" for name, value in arguments.items() if value is not None and value is not False]
    return shlex.join(["tjepa", "prepare", *flags])
