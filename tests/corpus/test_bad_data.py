"""Bad data in bulk: more than a thousand bad documents and damaged files among good ones, and the run still ends."""

import gzip
import json
import math
import random
import re
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file
from test_masking import masking_strategies
from transformers import AutoTokenizer

from helpers import arguments, make_texts, run
from tjepa.corpus.documents import DataArguments, load_documents
from tjepa.corpus.tokenization import tokenize_documents
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.data_collator_tjepa import DataCollatorForTJEPA


NUM_GOOD = 200
NUM_OF_EACH = 100
SLOT_INDICES = ("slot_indices", "label_indices")
DROPPED = {  # kind of document -> the reason that must be given
    "null": lambda rng: (None, "null"),
    "number": lambda rng: (rng.choice([7, -1.5, 1e300, 0]), "not a string"),
    "structure": lambda rng: (rng.choice([True, ["a", "b"], {"text": "the fox"}]), "not a string"),
    "empty": lambda rng: ("", "empty or whitespace only"),
    "whitespace": lambda rng: ("".join(rng.choices(" \t\n\r\v\u3000\u2028", k=9)), "empty or whitespace only"),
    "zero width": lambda rng: ("".join(rng.choices("\u200b\u200d\u2060\ufeff\x00", k=9)), "empty or whitespace only"),
    "one token": lambda rng: (rng.choice("abcdefgh"), "shorter than min_tokens"),
    "lone surrogate": lambda rng: (f"the {chr(rng.randint(0xD800, 0xDFFF))} fox sees a red hen", "invalid unicode"),
}  # fmt: skip
KEPT = {
    "control characters": lambda rng: "".join(map(chr, rng.choices(range(1, 32), k=20))) + "\x00\x1b[31m the fox\x7f",
    "right to left": lambda rng: "\u202e" + "".join(rng.choices("שלום עולם مرحبا بالعالم", k=60)),
    "emoji": lambda rng: "".join(rng.choices(["👩‍👩‍👧‍👦", "🇫🇷", "👍🏽", "☠️", "e\u0301\u0301\u0301"], k=20)),
    "noise": lambda rng: "".join(map(chr, rng.choices(range(0xE000, 0x10FFFF), k=50))),
}
HUGE = {
    "200,000 characters in one line": lambda rng: "".join(rng.choices("abcdefghij ", k=200_000)),
    "one token 10,000 times": lambda rng: " the" * 10_000,
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs") / "tokenizer"
    train_tokenizer(make_texts(60), vocab_size=300, model_max_length=64).save_pretrained(folder)
    return folder


def make_corpus() -> tuple[list, dict[str, int], int]:
    """Good and bad documents in random order; how many must be dropped for which reason; how many must be kept."""
    rng = random.Random(0)
    documents, dropped = make_texts(NUM_GOOD), {}
    for make in DROPPED.values():
        for _ in range(NUM_OF_EACH):
            text, reason = make(rng)
            documents.append(text)
            dropped[reason] = dropped.get(reason, 0) + 1
    documents += [make(rng) for make in KEPT.values() for _ in range(NUM_OF_EACH)]
    documents += [make(rng) for make in HUGE.values() for _ in range(5)]
    num_bad = len(documents) - NUM_GOOD
    assert num_bad > 1000
    rng.shuffle(documents)
    return documents, dropped, len(documents) - sum(dropped.values())


def to_jsonl(documents: list) -> bytes:
    return "".join(json.dumps({"text": document}) + "\n" for document in documents).encode()


def dropped_in_card(card: str) -> dict[str, int]:
    rows = re.findall(r"^    ([a-z_ ]+?) {2,}([\d,]+)$", card.split("validation:")[0], flags=re.MULTILINE)
    return {reason: int(count.replace(",", "")) for reason, count in rows}


def test_a_run_on_bad_data(tokenizer_folder, tmp_path, monkeypatch, caplog):
    documents, dropped, num_kept = make_corpus()
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    half = len(documents) // 2
    (corpus / "a.jsonl").write_bytes(to_jsonl(documents[:half]) + b'{"text": "the fox sees\n')
    (corpus / "b.jsonl.gz").write_bytes(gzip.compress(to_jsonl(documents[half:])))
    whole = gzip.compress(to_jsonl(make_texts(50)))
    (corpus / "no-gzip.jsonl.gz").write_bytes(b"not compressed at all\n")
    (corpus / "truncated.jsonl.gz").write_bytes(whole[:20])  # the header and next to nothing
    dropped["unreadable"] = 3
    (tmp_path / "validation.jsonl").write_bytes(to_jsonl(make_texts(8, 1)))

    overrides = {"max_steps": None, "num_train_epochs": 1, "save_strategy": "no", "per_device_train_batch_size": 64}
    files = {"train_file": corpus / "*.jsonl*", "validation_file": tmp_path / "validation.jsonl"}
    names = {"tokenizer_name": tokenizer_folder, "cache_dir": tmp_path / "cache"}
    run(monkeypatch, arguments(tmp_path, tmp_path / "out", **files, **names, **overrides))

    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["documents"]["train"]["dropped"] == dropped
    assert results["documents"]["train"]["num_kept"] == num_kept
    assert dropped_in_card((tmp_path / "out" / "README.md").read_text()) == dropped
    assert results["train_steps"] == math.ceil(num_kept / 64) and results["dropped_in_batches"] == 0
    assert math.isfinite(results["train_loss"]) and math.isfinite(results["eval_loss"])
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    for name in ("no-gzip.jsonl.gz", "truncated.jsonl.gz"):  # the log says which file
        assert f"{name} is damaged" in caplog.text


def test_a_stream_of_bad_documents(tokenizer_folder, tmp_path, monkeypatch):
    documents, dropped, num_kept = make_corpus()
    documents = [text for text in documents if not is_surrogate(text)]  # no JSON: its reader refuses them
    del dropped["invalid unicode"]
    (tmp_path / "train.jsonl").write_bytes(to_jsonl(documents))
    (tmp_path / "validation.jsonl").write_bytes(to_jsonl(make_texts(8, 1)))
    files = {"train_file": tmp_path / "train.jsonl", "validation_file": tmp_path / "validation.jsonl"}
    names = {"tokenizer_name": tokenizer_folder, "cache_dir": tmp_path / "cache"}
    overrides = {"streaming": True, "max_steps": math.ceil(num_kept / 64), "dataloader_num_workers": 1}
    sizes = {"per_device_train_batch_size": 64, "save_strategy": "no"}
    run(monkeypatch, arguments(tmp_path, tmp_path / "out", **files, **names, **overrides, **sizes))
    train = json.loads((tmp_path / "out" / "all_results.json").read_text())["documents"]["train"]
    # counted in the worker, which is ahead: it has begun to read the documents again
    num_readings = train["num_kept"] / num_kept
    assert 1 <= num_readings < 10 and set(train["dropped"]) == set(dropped)
    assert all(0.8 < train["dropped"][reason] / (num_readings * count) < 1.2 for reason, count in dropped.items())
    assert dropped_in_card((tmp_path / "out" / "README.md").read_text()) == train["dropped"]


def is_surrogate(text) -> bool:
    return isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text)


def load(path: Path, text_column_name: str = "text"):
    args = DataArguments(train_file=str(path), validation_split_percentage=0, text_column_name=text_column_name)
    return load_documents(args, cache_dir=str(path.parent / "cache"))["train"], args


def counts_of(path: Path, tokenizer_folder: Path, **kwargs) -> tuple[int, dict[str, int]]:
    documents, args = load(path, **kwargs)
    _, counts = tokenize_documents(documents, AutoTokenizer.from_pretrained(tokenizer_folder), args, "train")
    return counts.num_kept, counts.dropped


def test_text_files_with_nul_bytes_and_other_encodings(tokenizer_folder, tmp_path):
    good = "\n".join(make_texts(20)).encode()
    (tmp_path / "nul.txt").write_bytes(good + b"\nthe fox\x00sees a red hen\n\x00\x00\x00\x00\n\n")
    assert counts_of(tmp_path / "nul.txt", tokenizer_folder) == (21, {"empty or whitespace only": 2})
    (tmp_path / "latin.txt").write_bytes(good + b"\ncaf\xe9 at night\r\n\xff\xfeutf-16?\nthe fox sees\n")
    assert counts_of(tmp_path / "latin.txt", tokenizer_folder) == (21, {"invalid unicode": 2})
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 at night\n" * 3)
    with pytest.raises(ValueError, match="was dropped: invalid unicode 3. Files are read as UTF-8: convert them"):
        counts_of(tmp_path / "latin.txt", tokenizer_folder)


def test_damaged_parquet_files(tokenizer_folder, tmp_path, caplog):
    for name in ("a", "b", "c"):
        parquet.write_table(pyarrow.table({"title": ["t"] * 20, "text": make_texts(20)}), tmp_path / f"{name}.parquet")
    content = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(content[: len(content) // 2])
    (tmp_path / "c.parquet").write_bytes(b"<html>404: not found</html>")
    assert counts_of(tmp_path / "*.parquet", tokenizer_folder) == (20, {"unreadable": 2})
    assert "b.parquet is damaged" in caplog.text and "c.parquet is damaged" in caplog.text
    with pytest.raises(ValueError, match="the train split was dropped: unreadable 1. A jsonl file holds one"):
        counts_of(tmp_path / "b.parquet", tokenizer_folder)


def test_damaged_json_and_csv(tokenizer_folder, tmp_path):
    rows = [{"body": text} for text in make_texts(20)]
    rows[7]["body"] += " \udcff"
    (tmp_path / "list.json").write_text(json.dumps([*rows, "no mapping"]))
    assert counts_of(tmp_path / "list.json", tokenizer_folder, text_column_name="body") == (
        19,
        {"invalid unicode": 1, "unreadable": 1},
    )
    lines = [f'{i},"{text}"' for i, text in enumerate(make_texts(20))]
    content = (
        "\n".join(["id,text", *lines, '20,"' + "the fox " * 25_000 + '"', "21"]).encode() + b"\n22,caf\xe9 at night\n"
    )
    (tmp_path / "table.csv").write_bytes(content)
    assert counts_of(tmp_path / "table.csv", tokenizer_folder) == (21, {"null": 1, "invalid unicode": 1})


def test_what_was_readable_of_a_truncated_file_is_used_and_the_cache_knows_when_it_was_mended(
    tokenizer_folder, tmp_path
):
    path = tmp_path / "train.jsonl.gz"
    whole = gzip.compress(to_jsonl(make_texts(3000)))
    path.write_bytes(whole[: len(whole) * 3 // 4])
    num_kept, dropped = counts_of(path, tokenizer_folder)
    assert 1000 < num_kept < 3000 and dropped == {"unreadable": 1}
    assert counts_of(path, tokenizer_folder) == (num_kept, dropped)
    path.write_bytes(whole[: len(whole) * 7 // 8])
    assert counts_of(path, tokenizer_folder)[0] > num_kept
    path.write_bytes(whole)
    assert counts_of(path, tokenizer_folder) == (3000, {})


# ---- any token sequences whatever ----

token_sequences = st.one_of(
    st.lists(st.integers(0, 2**31 - 1), max_size=60),  # anything, also nothing and a single token
    st.builds(lambda token, length: [token] * length, st.integers(0, 9), st.integers(0, 200)),  # one token for ever
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(token_sequences, max_size=6),
    st.lists(masking_strategies(), min_size=1, max_size=3),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_collator_takes_any_documents(documents, strategies, seed, in_rows, hide_recurring, one_view):
    collator = DataCollatorForTJEPA(
        strategies,
        seed,
        row_length=200 if in_rows else None,
        mask_recurring_targets=hide_recurring,
        views_per_document=1 if one_view else None,
    )
    examples = [{"input_ids": ids, "document_index": i, "epoch": 0} for i, ids in enumerate(documents)]
    batch = {name: tensor.numpy() for name, tensor in collator(examples).items() if name != "view_groups"}
    kept = [ids for ids in documents if len(ids) >= 2]
    assert collator.num_dropped_documents == len(documents) - len(kept)

    tokens, positions = batch["input_ids"].ravel(), batch["position_ids"].ravel()
    document_of_token = batch["document_ids"].ravel()
    for document, ids in enumerate(kept):
        assert tokens[document_of_token == document].tolist() == ids
        assert positions[document_of_token == document].tolist() == list(range(len(ids)))
    assert (document_of_token >= 0).sum() == sum(map(len, kept))

    # every view sees something and predicts something of one document, each at its own position
    view_of_entry, block_of_entry = batch["prediction_view_ids"].ravel(), batch["prediction_block_ids"].ravel()
    position_of_entry, slots, labels = batch["prediction_position_ids"].ravel(), *map(batch.get, SLOT_INDICES)
    assert (position_of_entry[slots] == positions[labels]).all() and (block_of_entry[slots] > 0).all()
    assert (block_of_entry > 0).sum() == len(slots)
    views = set(view_of_entry[view_of_entry >= 0].tolist())
    assert len(views) == len(kept) * (1 if one_view else len(strategies))
    assert set(view_of_entry[slots].tolist()) == views == set(batch["context_view_ids"].ravel().tolist()) - {-1}
    context_documents = document_of_token[batch["context_indices"].ravel()]
    for view in views:
        seen = set(context_documents[batch["context_view_ids"].ravel() == view].tolist())
        assert seen == set(document_of_token[labels[view_of_entry[slots] == view]].tolist()) and len(seen) == 1
    assert batch["slots_per_strategy"].sum() == len(slots)
