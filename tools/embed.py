"""Embeds the texts of a file: a vector and an id for each, in parquet files or numpy arrays that any index takes.

    tjepa embed texts.jsonl --output embeddings
    tjepa embed "corpus/*.parquet" --model runs/quickstart-sentences --output embeddings --format npy

The output folder then holds part-00000.parquet, ... with the columns id and embedding, or ids.npy and embeddings.npy,
float32 [texts, dimensions]. An id is the number of the text's row, from 0 up, or what --id_column_name holds. Modules
of sentence-transformers beside an encoder count, too: the vectors of a folder that `tjepa export` wrote are those of
its `encode`. All cores work, or the GPU. Interrupted, the same command goes on where it was.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import torch
from datasets import Dataset
from datasets.utils import tqdm
from pyarrow import parquet

from ..corpus.atomic_writes import check_writable, holds_something, replacing_files
from ..corpus.command_line import at_least_one, start
from ..corpus.faults import advise, count_reasons, find_fault, list_reasons
from ..corpus.files import FAULT_COLUMN, find_paths, load_files
from ..corpus.paths import find_newest_run
from ..downstream.embedding import Embedder, load_embedder
from ..training.setup import hide_what_loading_says


TEXTS_PER_PART = 4096  # of a file that is written, and embedded again after an interruption
TEXTS_PER_STEP = 256  # of the progress bar
SETTINGS = "_settings.json"  # readers of a folder of parquet files pass over names that begin so
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_texts(
    pattern: str,
    text_column_name: str,
    id_column_name: str | None = None,
    output_format: str = "parquet",
    cache_dir: str | None = None,
) -> Dataset:
    """
    The rows of files. Without ids the texts alone are read, into the cache of datasets rather than into memory.

    Raises:
        FileNotFoundError, ValueError: as `load_files`; if a column is not there, or an id, or for ids that the format
            of the output cannot hold.
    """
    if id_column_name is None:
        return load_files("FILE", pattern, cache_dir=cache_dir, text_column_name=text_column_name)
    rows = load_files("FILE", pattern, cache_dir=cache_dir)
    for flag, name in (("text_column_name", text_column_name), ("id_column_name", id_column_name)):
        if name not in rows.column_names:
            raise ValueError(f"{pattern} has no column {name!r}, only {rows.column_names}: pass --{flag}.")
    if None in rows[id_column_name]:
        raise ValueError(f"{pattern} has a row without an id in its column {id_column_name!r}.")
    kind = rows.features[id_column_name]
    if output_format == "npy" and not getattr(kind, "dtype", "").startswith(
        ("int", "uint", "float", "string", "large_s")
    ):
        raise ValueError(f"The ids of {pattern} are {kind}, and --format npy takes numbers and texts: leave it out.")
    return rows


def embed_part(embedder: Embedder, ids: pyarrow.Array, texts: list, batch_size: int, bar: tqdm) -> pyarrow.Table:
    """Columns id and embedding of the texts that can be embedded."""
    kept, vectors = [], [torch.zeros(0, embedder.width)]
    for first in range(0, len(texts), TEXTS_PER_STEP):
        step = range(first, min(first + TEXTS_PER_STEP, len(texts)))
        usable = [index for index in step if find_fault(texts[index]) is None]
        encoded = dict(zip(usable, embedder.tokenize([texts[index] for index in usable]), strict=True))
        encoded = {index: tokens for index, tokens in encoded.items() if tokens}
        if encoded:
            kept += encoded
            vectors.append(embedder.embed_tokens(list(encoded.values()), batch_size))
        bar.update(len(step))
    flat = pyarrow.array(torch.cat(vectors).flatten().numpy())
    embeddings = pyarrow.FixedSizeListArray.from_arrays(flat, embedder.width)
    if pyarrow.types.is_string_view(ids.type):  # of which pyarrow takes none
        ids = ids.cast(pyarrow.large_string())
    return pyarrow.table({"id": ids.take(pyarrow.array(kept, pyarrow.int64())), "embedding": embeddings})


def claim_folder(folder: Path, settings: dict) -> None:
    """
    Writes what the vectors depend on into a folder for them, or compares it with what is there.

    Raises:
        ValueError: if it holds vectors made in another way.
    """
    path = folder / SETTINGS
    if path.is_file():
        there = json.loads(path.read_text(encoding="utf-8"))
        for name, value in settings.items():
            if (before := there.get(name)) != value:
                differs = f"{before}; now {value}"
                if isinstance(before, list) and isinstance(value, list):
                    changed = sorted(
                        {state[0] for state in before + value if state not in before or state not in value}
                    )
                    differs = f"{changed[0]}{f' and {len(changed) - 1} more' if changed[1:] else ''} changed"
                raise ValueError(
                    f"{folder} holds vectors of another {name} ({differs}): choose another --output, or delete it."
                )
    with replacing_files(folder) as unfinished:
        (unfinished / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def states_of(paths: list[str]) -> list[list]:
    """Size and time of files; those of another name are taken as they were."""
    stats = [(path, Path(path).stat()) for path in paths if Path(path).is_file()]
    return [[str(Path(path).resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in stats]


def write_arrays(folder: Path, parts: list[Path]) -> None:
    """Parts to `ids.npy` and `embeddings.npy`, which are never in memory as a whole."""
    num_texts = sum(parquet.read_metadata(path).num_rows for path in parts)
    width = parquet.read_schema(parts[0]).field("embedding").type.list_size
    with replacing_files(folder) as unfinished:
        shape = (num_texts, width)
        whole = np.lib.format.open_memmap(unfinished / "embeddings.npy", "w+", np.float32, shape)
        ids, first = [], 0
        for path in parts:
            part = parquet.read_table(path)
            flat = part["embedding"].combine_chunks().flatten().to_numpy()
            whole[first : first + len(part)] = flat.reshape(-1, width)
            ids += part["id"].to_numpy().tolist()
            first += len(part)
        whole.flush()
        np.save(unfinished / "ids.npy", np.array(ids), allow_pickle=False)  # moves into the folder last


def embed_file(args: argparse.Namespace) -> str:
    """
    Writes what is not there yet, and says what is there.

    Raises:
        FileExistsError: if the output folder holds something else.
        ValueError: if no text can be embedded.
    """
    check_writable(args.output, "--output")
    if holds_something(args.output) and not (args.output / SETTINGS).is_file():
        raise FileExistsError(f"{args.output} holds other files: choose another --output.")
    rows = load_texts(args.file, args.text_column_name, args.id_column_name, args.format, args.cache_dir)
    has_faults = FAULT_COLUMN in rows.column_names
    faults = rows[FAULT_COLUMN][:] if has_faults else map(find_fault, rows[args.text_column_name][:])
    left_out = count_reasons(faults)
    if left_out.total() == len(rows):
        raise ValueError(f"{args.file} holds no text that could be read: {list_reasons(left_out)}. {advise(left_out)}")
    embedder = load_embedder(args.model, max_length=args.max_length, dtype=DTYPES[args.dtype], flag="--model")
    folder = Path(args.model)
    # its own and its modules' (2_Dense); not what a run keeps beside them, nor the index of `tjepa search`
    patterns = ("*.safetensors", "pytorch_model*.bin", "*config*.json", "tokenizer.json", "modules.json", "[0-9]*_*/*")
    model_files = sorted(str(path) for pattern in patterns for path in folder.glob(pattern))
    settings = {
        "model": states_of(model_files) or args.model,
        "file": states_of(find_paths(args.file)) or args.file,
        "max_length": embedder.max_length,
        **{name: getattr(args, name) for name in ("text_column_name", "id_column_name", "dtype", "format")},
    }
    claim_folder(args.output, settings)
    starts = range(0, len(rows), TEXTS_PER_PART)
    parts = [args.output / f"part-{index:05}.parquet" for index in range(len(starts))]
    if not (args.output / "ids.npy").is_file():
        with tqdm(total=len(rows), unit=" texts", desc="embedding") as bar:
            for first, path in zip(starts, parts, strict=True):
                part = rows.with_format("arrow")[first : first + TEXTS_PER_PART]
                if path.is_file():
                    bar.update(len(part))
                    continue
                numbers = pyarrow.array(range(first, first + len(part)), pyarrow.int64())
                ids = numbers if args.id_column_name is None else part[args.id_column_name]
                table = embed_part(embedder, ids, part[args.text_column_name].to_pylist(), args.batch_size, bar)
                with replacing_files(args.output) as unfinished:
                    with parquet.ParquetWriter(unfinished / path.name, table.schema) as writer:
                        if len(table):  # readers of datasets stop at a group without rows
                            writer.write_table(table)
        if args.format == "npy":
            write_arrays(args.output, parts)
    if args.format == "npy":
        for path in parts:
            path.unlink(missing_ok=True)
        num_embedded = len(np.load(args.output / "ids.npy", mmap_mode="r"))
    else:
        num_embedded = sum(parquet.read_metadata(path).num_rows for path in parts)
    left_out += Counter({"without a token": len(rows) - num_embedded - left_out.total()})  # but not if that is 0
    if not num_embedded:
        raise ValueError(f"{args.file} holds no text that could be read: {list_reasons(left_out)}.")
    without = f"; left out: {list_reasons(left_out)}" if left_out else ""
    if args.id_column_name and (num_copies := len(rows) - len({*map(str, rows[args.id_column_name][:])})):
        without += f"; {num_copies:,} rows have the id of another, where a database may keep one of them alone"
    how = f"the first {embedder.max_length} tokens of each, by {args.model}"
    return f"{args.output}: vectors of {num_embedded:,} texts ({how}){without}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", help="parquet, json, jsonl, csv, tsv or txt (a text a line); or a glob in quotes")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--model", help="folder or Hub name of the encoder; default: the newest under runs/")
    parser.add_argument("--format", choices=("parquet", "npy"), default="parquet")
    parser.add_argument("--text_column_name", default="text", help="the column that holds the texts")
    parser.add_argument("--id_column_name", help="the column that holds the ids; default: numbers of rows, from 0 up")
    parser.add_argument(
        "--max_length", type=at_least_one, help="tokens of a text that are read; default: as the model, at most 512"
    )
    parser.add_argument("--batch_size", type=at_least_one, default=64, help="texts per forward")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the encoder; bfloat16 is for GPUs and processors with AMX or AVX512-BF16",
    )
    parser.add_argument("--cache_dir", help="where the cache of datasets is")
    args = parser.parse_args()
    args.model = args.model or str(find_newest_run())
    hide_what_loading_says()
    try:
        print(embed_file(args))
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on with {args.output}.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    start(main)
