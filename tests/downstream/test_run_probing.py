"""The script on tiny encoders, ours and BERT, with data made here; what is refused, and what is dropped and said."""

import gzip
import json
import logging
import sys

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from helpers import make_tiny_config, write_jsonl
from tjepa import TJEPAForPreTraining, TJEPAModel
from tjepa.corpus.files import load_table
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.downstream import run_probing
from tjepa.downstream.embedding import choose_max_length
from tjepa.downstream.probe import ProbeTask, embed_task, probe_tasks_with_tfidf
from tjepa.downstream.run_probing import ProbingArguments, find_files, load_tasks, short_names


ANIMALS = ["fox", "hen", "cow", "owl", "ant"]
COLOURS = ["red", "blue", "green", "grey", "pink"]
OTHERS = ["the", "and", "sees", "near", "old", "small"]


@pytest.fixture(autouse=True)
def restored_verbosity():
    """The script silences transformers; the tests after this file may want to hear it."""
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


def make_row(rng: np.random.Generator) -> dict:
    """A text of animals or of colours, and other words; a tag tells which kind a word is."""
    kind = int(rng.integers(2))
    words = [str(word) for word in rng.choice((ANIMALS, COLOURS)[kind] + OTHERS, size=rng.integers(4, 12))]
    words.append((ANIMALS, COLOURS)[kind][0])
    tags = ["A" if word in ANIMALS else "C" if word in COLOURS else "O" for word in words]
    return {"text": " ".join(words), "label": kind, "tokens": words, "some_tags": tags}


def write(path, rows: list[dict], columns: tuple[str, ...]) -> None:
    write_jsonl(path, [{name: row[name] for name in columns} for row in rows])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = {split: [make_row(rng) for _ in range(num)] for split, num in {"train": 80, "test": 40}.items()}
    for split, content in rows.items():
        write(folder / f"kinds-{split}.jsonl", content, ("text", "label"))
        write(folder / f"words-{split}.jsonl", content, ("tokens", "some_tags"))
    pairs = [
        {"sentence1": a["text"], "sentence2": b["text"], "score": 5.0 * (a["label"] == b["label"])}
        for a, b in zip(rows["train"][:40], rows["test"], strict=True)
    ]
    write(folder / "pairs-test.jsonl", pairs, ("sentence1", "sentence2", "score"))
    (folder / "README.md").write_text("not data")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, data):
    """A T-JEPA pretraining folder and a BERT, each with its tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    texts = [json.loads(line)["text"] for line in (data / "kinds-train.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, vocab_size=300, model_max_length=16)
    torch.manual_seed(0)
    ours = TJEPAForPreTraining(make_tiny_config(vocab_size=300))
    config = BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for name, model in {"ours": ours, "bert": BertModel(config)}.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def test_script(models, data, tmp_path, monkeypatch, capsys, caplog):
    arguments = ["--model_name_or_path", models / "ours", models / "bert", "--data_dir", data, "--num_seeds", 2]
    arguments += ["--output", tmp_path / "new" / "out.json", "--plot", tmp_path / "out.png", "--max_length", 10]
    monkeypatch.setattr(sys, "argv", ["run_probing.py", "--token=hf_secret", *map(str, arguments)])
    caplog.set_level(logging.INFO)
    run_probing.main()

    assert "hf_secret" not in (tmp_path / "new" / "out.json").read_text()
    results = json.loads((tmp_path / "new" / "out.json").read_text())["results"]
    assert list(results) == [
        *("ours", "ours untrained", "ours embeddings", "bert", "bert untrained", "bert embeddings", "TF-IDF")
    ]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    for figures in results.values():
        assert {"kinds/linear_probe_std", "kinds/knn_std", "words/linear_probe_std", "pairs/spearman"} <= set(figures)
    assert results["TF-IDF"]["kinds/linear_probe"] == results["TF-IDF"]["words/linear_probe"] == 1.0  # words tell all
    assert results["ours"]["words/linear_probe"] > 0.8  # frequencies: O 0.5
    assert results["ours"]["quality/width"] == 32 and 1 <= results["ours"]["quality/rankme"] <= 32
    assert "pairs/spearman_std" not in results["ours"]  # nothing is drawn
    assert results["ours untrained"]["pairs/spearman_std"] > 0  # other initialisations, other figures

    # what the script reports is what the functions give
    tasks, options = load_tasks(None, str(data)), {"max_length": 10}
    encoder, tokenizer = AutoModel.from_pretrained(models / "ours"), AutoTokenizer.from_pretrained(models / "ours")
    for name, figure in run_probing.probe_encoder(encoder, tokenizer, tasks, (0, 1), options).items():
        assert results["ours"][name] == pytest.approx(figure, abs=1e-6), name
    torch.manual_seed(1)
    untrained = TJEPAModel(encoder.config)
    one = run_probing.probe_encoder(untrained, tokenizer, tasks, (1,), options)
    torch.manual_seed(0)
    other = run_probing.probe_encoder(TJEPAModel(encoder.config), tokenizer, tasks, (0,), options)
    for name, figure in one.items():
        assert results["ours untrained"][name] == pytest.approx((figure + other[name]) / 2, abs=1e-6), name

    table, said = capsys.readouterr().out, caplog.text
    assert "kinds linear_probe" in table and " ± " in table and "TF-IDF" in table
    assert "kinds: classification (text -> label, 2 classes), test 40, train 80" in said
    assert "words: tagging (tokens -> some_tags, 3 classes)" in said
    assert "pairs: similarity (sentence1 + sentence2 -> score), test 40" in said
    assert "ours: the first 10 tokens of a text, without special tokens" in said
    assert "bert: the first 10 tokens of a text, without special tokens" in said  # its tokenizer adds none
    lengths = [len(tokenizer(text)["input_ids"]) for split in tasks[0].splits.values() for text in split["text"]]
    num_cut = sum(length > 10 for length in lengths)
    assert 0 < num_cut < 120 and f"kinds: {num_cut} of 120 texts are longer and cut" in said
    assert "words, which have no token before the cut" in said


def test_context_encoder_is_probed_when_asked(models, data, monkeypatch, tmp_path):
    model = TJEPAForPreTraining.from_pretrained(models / "ours")
    with torch.no_grad():
        model.context_encoder.token_embedding.weight.neg_()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(models / "ours").save_pretrained(tmp_path / "model")

    figures = {}
    for encoder in ("target", "context"):
        arguments = ["--model_name_or_path", tmp_path / "model", "--data_dir", data, "--dataset", "pairs"]
        arguments += ["--encoder", encoder, "--output", tmp_path / "out.json", "--num_seeds", 1]
        monkeypatch.setattr(sys, "argv", ["run_probing.py", *map(str, arguments)])
        run_probing.main()
        figures[encoder] = json.loads((tmp_path / "out.json").read_text())["results"]["model"]["pairs/spearman"]
    assert figures["target"] != figures["context"]


# --- Data ------------------------------------------------------------------------------------------------------------


def test_a_missing_model_is_named_before_any_data_is_read(models, monkeypatch):
    name = models / "ours"
    monkeypatch.setattr(sys, "argv", ["run_probing.py", "--model_name_or_path", f"{name}x", "--dataset=a=none.jsonl"])
    with pytest.raises(FileNotFoundError, match=f"--model_name_or_path {name}x: there is no such file or folder"):
        run_probing.main()


def test_rows_that_can_not_be_used_are_dropped_and_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tjepa")
    good = [{"text": f"word {i}", "label": ["no", "yes"][i % 2]} for i in range(4)]
    bad = [{"text": None, "label": "no"}, {"text": " ", "label": "no"}, {"text": "word", "label": None}]
    write(tmp_path / "a.jsonl", good + bad, ("text", "label"))
    write(tmp_path / "b.jsonl", [*good, {"text": "word", "label": "maybe"}], ("text", "label"))
    (task,) = load_tasks([f"mine={tmp_path}/a.jsonl,{tmp_path}/b.jsonl"], None)
    assert task.splits["train"] == {"text": [f"word {i}" for i in range(4)], "label": [1, 2, 1, 2]}
    assert task.splits["test"]["label"] == [1, 2, 1, 2, 0]  # maybe, no, yes
    assert "3 rows of train dropped (text or label missing or invalid)" in caplog.text
    assert "labels of test that train does not have, always wrong: ['maybe']" in caplog.text


def test_csv_and_parquet_and_three_splits(tmp_path):
    rows = Dataset.from_dict({"text": ["a b", "c d", "e f"], "label": ["007", "NA", ""]})
    rows.to_csv(tmp_path / "a.csv")
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_csv(tmp_path / "b.csv")
    (task,) = load_tasks([f"mine={tmp_path}/a.csv,{tmp_path}/a.parquet,{tmp_path}/b.csv"], None)
    assert list(task.splits) == ["train", "validation", "test"]
    assert all(split == {"text": ["a b", "c d"], "label": [0, 1]} for split in task.splits.values())


def test_labels_are_read_as_in_fine_tuning(tmp_path):
    """1, 1.0 and "1" are one class, and -1 is one where there are others; throughout a split it is kept secret."""
    signs = {"text": ["a b", "c d", "e f"], "label": [-1, 0, 1]}
    Dataset.from_dict(signs).to_json(tmp_path / "a.jsonl")
    Dataset.from_dict(signs).to_csv(tmp_path / "a.csv")
    Dataset.from_dict({**signs, "label": [-1.0, None, 1.0]}).to_parquet(tmp_path / "a.parquet")
    (task,) = load_tasks([f"mine={tmp_path}/a.jsonl,{tmp_path}/a.csv,{tmp_path}/a.parquet"], None)
    assert [split["label"] for split in task.splits.values()] == [[0, 1, 2], [0, 1, 2], [0, 2]]
    Dataset.from_dict({**signs, "label": [-1] * 3}).to_json(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match="none of the 3 rows of test has both text and label"):
        load_tasks([f"mine={tmp_path}/a.jsonl,{tmp_path}/b.jsonl"], None)


def test_without_words_there_is_no_tfidf(tmp_path, caplog):
    rows = [{"text": "ab"[i % 2], "label": i % 2} for i in range(20)]
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, rows, ("text", "label"))
    tasks = load_tasks([f"mine={tmp_path}/a.jsonl,{tmp_path}/b.jsonl"], None)
    assert probe_tasks_with_tfidf(tasks) == {}
    assert "mine is left out for TF-IDF: none of its texts has a word of two letters" in caplog.text


def test_one_row_to_judge_by(models, tmp_path):
    rows = [{"text": "red fox old hen"[: 4 + i % 8], "label": i % 2} for i in range(20)]
    write(tmp_path / "a.jsonl", rows, ("text", "label"))
    write(tmp_path / "b.jsonl", rows[:1], ("text", "label"))
    tasks = load_tasks([f"mine={tmp_path}/a.jsonl,{tmp_path}/b.jsonl"], None)
    encoder, tokenizer = AutoModel.from_pretrained(models / "ours"), AutoTokenizer.from_pretrained(models / "ours")
    options = {"max_length": 16, "add_special_tokens": False, "batch_size": 64}
    figures = run_probing.probe_encoder(encoder, tokenizer, tasks, range(2), options)
    assert figures["mine/linear_probe"] in (0.0, 0.5, 1.0) and "quality/width" not in figures


def test_every_column_of_tags_is_a_task_and_words_are_limited(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tjepa")
    row = {"tokens": ["a", "b", "c"], "pos_tags": ["X", "Y", "X"], "chunk_tags": ["B", "I", "O"]}
    torn = {**row, "pos_tags": ["X"]}
    for split in ("train", "test"):
        write(tmp_path / f"t-{split}.jsonl", [row] * 10 + [torn], tuple(row))
    chunks, pos = load_tasks(None, str(tmp_path), max_words=7)
    assert (chunks.name, pos.name, pos.kind) == ("t.chunk_tags", "t.pos_tags", "tagging")
    assert [len(task.splits["train"]["tokens"]) for task in (chunks, pos)] == [3, 3]  # 9 words
    assert "3 of the 10 rows of train are used" in caplog.text and "1 rows of train dropped" in caplog.text


def test_tags_of_minus_100_are_neither_learned_nor_judged(models, tmp_path):
    rows = [{"tokens": ["a", "fox", "b"], "x_tags": [-100, 3, 5]}, {"tokens": ["a"], "x_tags": [-100]}] * 6
    for split in ("train", "test"):
        write(tmp_path / f"t-{split}.jsonl", rows, ("tokens", "x_tags"))
    (task,) = load_tasks(None, str(tmp_path))
    assert task.splits["train"]["tags"] == [[-100, 0, 1]] * 6
    named = [{"tokens": ["a", 5, "b"], "x_tags": [-100, "X", "Y"]}, {"tokens": ["a"], "x_tags": ["X"]}]
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, named, ("tokens", "x_tags"))
    (of_names,) = load_tasks([f"mine={tmp_path}/a.jsonl,{tmp_path}/b.jsonl"], None)
    assert of_names.splits["test"] == {"tokens": [["a", "5", "b"], ["a"]], "tags": [[-100, 0, 1], [0]]}
    encoder, tokenizer = AutoModel.from_pretrained(models / "ours"), AutoTokenizer.from_pretrained(models / "ours")
    embedded = embed_task(encoder, tokenizer, task, max_length=16)
    assert embedded["test"].labels.tolist() == [0, 1] * 6
    assert probe_tasks_with_tfidf([task], seeds=(0,)) == {"t/linear_probe": 1.0}


def test_samples_are_limited_and_the_same_for_a_seed(data):
    first, again, other = (load_tasks(["kinds"], str(data), max_samples=10, seed=seed)[0] for seed in (0, 0, 1))
    assert first.splits == again.splits != other.splits
    assert [len(split["label"]) for split in first.splits.values()] == [10, 10]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "a", "label": 0}], "What is mine for.*columns.*'label', 'sentence'.*Needed are.*; text, label"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}], "not numbers with a fraction"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "two classes or more"),
        ([{"text": "a", "label": [0, 1]}, {"text": "b", "label": [1]}], "label of train holds lists"),
        ([{"text": "a", "label": "0.5"}, {"text": "b", "label": "1"}], "not numbers with a fraction"),
        ([{"text": "a", "label": ["b"]}, {"text": "b", "label": "b"}], "'label' holds lists that are written as text"),
        ([{"tokens": ["a"], "x_tags": 3}], "tokens and x_tags are lists with one entry for each word"),
        ([{"tokens": "a", "x_tags": "X"}], "tokens and x_tags are lists with one entry for each word"),
        ([{"text": "a", "label": -1}], "none of the 1 rows of train has both text and label"),
    ],
)
def test_data_that_is_refused(tmp_path, rows, message):
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, rows, tuple(rows[0]))
    with pytest.raises(ValueError, match=message):
        load_tasks([f"mine={tmp_path}/a.jsonl,{tmp_path}/b.jsonl"], None)


def test_sources_that_are_refused(data, tmp_path):
    with pytest.raises(ValueError, match="pass --data_dir FOLDER, or --dataset"):
        load_tasks(None, None)
    with pytest.raises(ValueError, match="has no files such as NAME-train.jsonl"):
        load_tasks(None, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        load_tasks(None, str(tmp_path / "none"))
    (tmp_path / "notes-test.txt").write_text("no columns")
    assert find_files(str(tmp_path)) == {}
    for name in ("t-train.csv", "t-train.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="has t-train twice: t-train.csv and t-train.jsonl"):
        load_tasks(None, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such data set.*'kinds', 'pairs', 'words'"):
        load_tasks(["other"], str(data))
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        load_tasks([f"mine={tmp_path}/a.csv"], None)
    twin = f"mine={data}/kinds-train.jsonl,{data}/kinds-test.jsonl"
    with pytest.raises(ValueError, match="two have one name. Give each data set a name of its own"):
        load_tasks([twin, twin], None)
    with pytest.raises(ValueError, match="--dataset mine: two splits are the same file"):
        load_tasks([f"mine={data}/kinds-train.jsonl,{data}/../{data.name}/kinds-train.jsonl"], None)
    write(
        tmp_path / "flat.jsonl",
        [{"sentence1": "a", "sentence2": "b", "score": 2}] * 3,
        ("sentence1", "sentence2", "score"),
    )
    with pytest.raises(ValueError, match="flat: score is the same in all rows"):
        load_tasks([f"flat={tmp_path}/flat.jsonl"], None)
    with pytest.raises(ValueError, match="has 4 files"):
        load_tasks(["mine=a,b,c,d"], None)
    with pytest.raises(ValueError, match="must be a json, jsonl, csv, tsv or parquet file"):
        load_tasks([f"mine={data}/README.md"], None)
    with pytest.raises(ValueError, match="needs the splits train and test; it has \\['test'\\]"):
        load_tasks([f"mine={data}/kinds-test.jsonl"], None)
    (data / "._kinds-train.jsonl").touch()  # as macOS leaves them
    assert set(find_files(str(data))) == {"kinds", "pairs", "words"}


def test_lengths_and_names(models):
    bert, ours = (AutoModel.from_pretrained(models / name) for name in ("bert", "ours"))
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    assert choose_max_length("bert", bert, tokenizer, None) == 16  # the tokenizer's
    with pytest.raises(ValueError, match="--max_length is 17, but bert is made for 16 tokens"):
        choose_max_length("bert", bert, tokenizer, 17)
    assert choose_max_length("ours", ours, tokenizer, 17) == 17  # rotary positions do not end
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["runs/a", "other/a"]) == ["runs/a", "other/a"]


def test_tfidf_uses_the_same_held_out_tenths(data):
    tasks = load_tasks(["kinds", "pairs"], str(data))
    figures = probe_tasks_with_tfidf(tasks, seeds=(0, 1))
    assert figures == probe_tasks_with_tfidf(tasks, seeds=(0, 1))
    assert set(figures) == {
        *(f"kinds/{measure}{end}" for measure in ("linear_probe", "knn") for end in ("", "_std")),
        "pairs/spearman",
    }


def test_what_would_be_ignored_or_end_in_a_traceback_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--output and --plot are for the data sets"):
        ProbingArguments(model_name_or_path=["x"], mteb=["y"], output="x.json")
    with pytest.raises(ValueError, match="--plot x.xyz is to be a PNG file"):
        ProbingArguments(model_name_or_path=["x"], plot="x.xyz")
    rows = {"text": ["a fox", "a hen", "a fox"], "label": [0, 1, 0]}
    with pytest.raises(ValueError, match="few: of 3 rows to train with a tenth is held out, .* of one class"):
        probe_tasks_with_tfidf([ProbeTask("few", "classification", {"train": rows, "test": rows})], seeds=range(9))


def test_compressed_files_of_a_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"mine-{split}.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a fox", "label": 1}\n' * 3))
    assert find_files(str(tmp_path))["mine"]["train"].name == "mine-train.jsonl.gz"
    assert load_table("x", tmp_path / "mine-train.jsonl.gz")["label"][:] == [1, 1, 1]


def test_shared_sets(shared_folder):
    tasks = load_tasks(None, str(shared_folder / "data" / "eval"), max_samples=50, max_words=50)
    kinds = {task.name: task.kind for task in tasks}
    assert kinds == {
        "conll2000-chunking.chunk_tags": "tagging",
        "conll2000-chunking.pos_tags": "tagging",
        "sst2": "classification",
        "sts14": "similarity",
        "subj": "classification",
        "trec": "classification",
    }
