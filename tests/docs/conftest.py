"""The folder in which the examples of the docs are run."""

import json
import shutil
import sys

import numpy as np
import pytest
from datasets import Dataset
from encoder_folders import make_folder

from helpers import REPOSITORY, TINY, arguments, make_texts, run
from tjepa.corpus import prepare_dataset
from tjepa.tools.export_sentence_transformer import export_sentence_transformer


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, inputs):
    """The files that the examples read: a tiny pretraining folder, an export of it, a few rows of each data set."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "runs").mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        flags = {
            "max_steps": 1,
            "save_strategy": "no",
            "do_eval": False,
            "hub_model_id": "me/stories",
            "max_length": 32,
            "config_overrides": f"{TINY},token_prediction_weight=1.0",
        }
        run(monkeypatch, arguments(inputs, folder / "runs" / "quickstart", **flags))
    export_sentence_transformer(
        folder / "runs" / "quickstart", folder / "runs" / "quickstart-sentences", with_onnx=True
    )
    shutil.copytree(folder / "runs" / "quickstart", folder / "runs" / "transformer")  # of the page on fine-tuning
    make_folder(folder / "runs" / "adapted")
    for name in ("sentence-transformers/all-MiniLM-L6-v2", "answerdotai/ModernBERT-base"):  # found before the Hub's
        (folder / name).parent.mkdir()
        make_folder(folder / name)
    for name in ("configs", "benchmarks", "docs"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tools").mkdir()
    for name in ("stories", "stories-small"):  # whose curves are kept
        (folder / "runs" / name).mkdir()
        for file in ("run.json", "log.jsonl"):
            shutil.copy(folder / "runs" / "quickstart" / file, folder / "runs" / name)
    (folder / "arrays").mkdir()
    for name in ("ids", "embeddings"):
        np.save(folder / "arrays" / f"{name}.npy", np.zeros((4, 8), np.float32))
    (folder / "data" / "eval").mkdir(parents=True)
    shutil.copytree(inputs / "tokenizer", folder / "my-tokenizer")
    texts = make_texts(60)
    labelled = [{"text": text, "label": index % 2} for index, text in enumerate(texts)]
    tags = [[("B-VP", "B-ADVP", "O")[len(word) % 3] for word in text.split()] for text in texts]
    tagged = [{"tokens": text.split(), "tags": row} for text, row in zip(texts, tags, strict=True)]
    minimal_pairs = [{"paradigm": "order", "good": text, "bad": " ".join(text.split()[::-1])} for text in texts]
    rows = {
        **dict.fromkeys(("sst2", "subj", "trec"), labelled),
        "sts14": [
            {"sentence1": a, "sentence2": b, "score": len(a) % 6} for a, b in zip(texts, texts[1:], strict=False)
        ],
        "conll2000-chunking": [
            {"tokens": row["tokens"], "chunk_tags": row["tags"], "pos_tags": row["tags"][::-1]} for row in tagged
        ],
    }
    for name, lines in rows.items():
        for split in ("test",) if name == "sts14" else ("train", "validation", "test"):
            write_rows(folder / "data" / "eval" / f"{name}-{split}.jsonl", lines)
    for name in ("train", "test", "texts"):
        write_rows(folder / f"{name}.jsonl", labelled)
    write_rows(folder / "pairs.jsonl", [{"anchor": text[:40], "positive": text} for text in texts])
    write_rows(folder / "words.jsonl", tagged)
    write_rows(folder / "agreement.jsonl", minimal_pairs)
    for split in ("train", "test"):
        kinds = [{"text": row["text"], "labels": [["VP"], ["ADVP", "VP"]][row["label"]]} for row in labelled]
        write_rows(folder / "runs" / f"chunk-types-{split}.jsonl", kinds)
    for name in ("corpus", "stories", "stories-validation", "data/books-train", "data/books-validation"):
        Dataset.from_list(labelled).to_parquet(folder / f"{name}.parquet")
    (folder / "my.txt").write_text("\n".join(texts) + "\n")
    with pytest.MonkeyPatch.context() as monkeypatch:  # what configs/tinystories.yaml reads
        paths = (
            f"--train_file={folder}/corpus.parquet --output_dir={folder}/data/tinystories --cache_dir={folder}/cache"
        )
        flags = [*paths.split(), f"--tokenizer_name={folder}/my-tokenizer", "--min_tokens=2"]
        monkeypatch.setattr(sys, "argv", ["tjepa prepare", *flags])
        prepare_dataset.main()
    return folder


def write_rows(path, rows: list[dict]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
