"""Fine-tuning at its end: what is written of a test split, of figures that are undefined, and of a model that fits."""

import json
import logging
import re
import shutil

import evaluate
import pytest
from safetensors.torch import load_file
from tokenizers import normalizers, pre_tokenizers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    pipeline,
)

from fault_injection import Fault, InjectedError
from finetuning_helpers import COLOURS, WORDS, arguments, make_rows, read_predictions, run
from helpers import make_tiny_config, make_word_tokenizer, write_jsonl
from tjepa import TJEPAModel
from tjepa.downstream import run_token_classification
from tjepa.downstream.finetuning import METRICS
from tjepa.downstream.tasks import TextTask, WordTask


# --- Predictions -----------------------------------------------------------------------------------------------------


def test_predictions_of_classes_labelled_or_not(folder, tmp_path, monkeypatch, caplog):
    """A line for each row in its order, whether it has a label, lacks one, or cannot be read."""
    rows = make_rows(6, seed=1)
    test = [rows[0], {**rows[1], "label": None}, {"text": " ", "label": "red"}, *rows[2:]]
    options = {"test_file": write_jsonl(tmp_path / "test.jsonl", test), "max_steps": 30}
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert (results["test_samples"], results["test_unlabelled"], results["test_dropped"]) == (5, 1, 1)
    lines = read_predictions(tmp_path / "out")
    assert [line["row"] for line in lines] == list(range(7))
    assert lines[2] == {"row": 2, "prediction": None, "fault": "empty or whitespace only"}
    judged = [(line, row) for line, row in zip(lines, test, strict=True) if row["label"] and line["row"] != 2]
    accuracy = sum(line["prediction"] == row["label"] for line, row in judged) / len(judged)
    assert accuracy == pytest.approx(results["test_accuracy"])
    for line in lines[:2] + lines[3:]:
        assert set(line["probabilities"]) == set(COLOURS)
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)

    # without a column of labels: the same predictions, no figures of the test split
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in test])
    model = {"model_name_or_path": tmp_path / "out", "do_train": False}
    with caplog.at_level(logging.INFO, logger="tjepa"):
        results = run(monkeypatch, arguments(folder, tmp_path / "bare", test_file=bare, **model))
    assert "none of its 6 rows has a label" in caplog.text and not [name for name in results if "test_acc" in name]
    assert [line["prediction"] for line in read_predictions(tmp_path / "bare")] == [
        line["prediction"] for line in lines
    ]


def test_predictions_stay_with_their_rows_where_training_groups_by_length(folder, tmp_path, monkeypatch):
    options = {"test_file": folder / "test.jsonl", "max_steps": 2}
    run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    options |= {"model_name_or_path": tmp_path / "out", "do_train": False}
    options["train_sampling_strategy"] = "group_by_length"
    run(monkeypatch, arguments(folder, tmp_path / "grouped", **options))
    assert read_predictions(tmp_path / "grouped") == read_predictions(tmp_path / "out")


def test_predictions_of_several_labels_and_of_drawn_rows(folder, tmp_path, monkeypatch):
    options = {"test_file": folder / "test.jsonl", "label_column": "colours", "max_predict_samples": 7, "max_steps": 5}
    run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    lines = read_predictions(tmp_path / "out")
    numbers = [line["row"] for line in lines]
    assert len(lines) == 7 and numbers == sorted(set(numbers)) and numbers != list(range(7))  # drawn, not the first
    for line in lines:
        assert line["prediction"] == [name for name, share in line["probabilities"].items() if share > 0.5]


def test_predictions_of_words(folder, tmp_path, monkeypatch):
    """A tag for each word; none where no token is left. Tags of -100 are neither learned nor judged nor a class."""
    train = [{"tokens": ["red", "fox"] * 4, "tags": ["A", "B"] * 4}, {"tokens": ["a", "hen"], "tags": [-100, "B"]}]
    train = [{**row, "tags": [str(tag) if tag != -100 else "-100" for tag in row["tags"]]} for row in train] * 10
    numbers = {"A": 3, "B": 5, "-100": -100}
    train = [{**row, "tags": [numbers[tag] for tag in row["tags"]]} for row in train]
    test = [
        {"tokens": ["red", "fox"], "tags": [3, -100]},  # judged at its first word alone
        {"tokens": ["fox"] * 40, "tags": None},
        {"tokens": ["hen", "fox"], "tags": [-100, -100]},
    ]
    files = {
        "train_file": write_jsonl(tmp_path / "train.jsonl", train),
        "test_file": write_jsonl(tmp_path / "test.jsonl", test),
    }
    argv = arguments(folder, tmp_path / "out", **files, validation_split_percentage=0, max_steps=30)
    results = run(monkeypatch, argv, script=run_token_classification)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "3", "1": "5"}
    assert results["test_samples"] == 1 and results["test_unlabelled"] == 2
    lines = read_predictions(tmp_path / "out")
    assert lines[0]["prediction"] == ["3", "5"] and results["test_accuracy"] == 1.0  # of one word
    assert [len(line["prediction"]) for line in lines] == [2, 40, 2]
    assert lines[1]["prediction"][0] is not None and lines[1]["prediction"][-1] is None  # beyond 32 tokens
    assert all(0.5 <= share <= 1 for share in lines[0]["probabilities"])


@pytest.mark.parametrize("is_ours", [True, False])
@pytest.mark.parametrize("is_pair", [True, False])
def test_pipelines_read_texts_as_fine_tuning_does(tmp_path, monkeypatch, is_ours, is_pair):
    """With BERT's tokenizer: T-JEPA gets no [CLS] and [SEP], BERT does, and in a text they are text for both."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[", "]", "cls", "sep", *WORDS, *COLOURS]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    how = {"pre_tokenizer": pre_tokenizers.BertPreTokenizer(), "normalizer": normalizers.Lowercase(), "second_type": 1}
    tokenizer = make_word_tokenizer(pieces, **how, model_max_length=24, **names)
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=24, **sizes))
    if is_ours:
        encoder = TJEPAModel(make_tiny_config(vocab_size=len(pieces), max_position_embeddings=24, pad_token_id=0))
    encoder.save_pretrained(tmp_path / "model")
    columns = ("sentence1", "sentence2") if is_pair else ("text",)
    rows = [
        {name: f"[SEP] {row['text']} [CLS]" for name in columns} | {"label": row["label"]} for row in make_rows(30)
    ]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    options = {"model_name_or_path": tmp_path / "model", "train_file": train, "test_file": train, "max_steps": 20}
    run(monkeypatch, arguments(tmp_path, tmp_path / "out", **options, cache_dir=tmp_path / "cache"))

    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    num_added = {(True, False): 0, (True, True): 1, (False, False): 2, (False, True): 3}[is_ours, is_pair]
    assert saved.num_special_tokens_to_add(pair=is_pair) == num_added
    assert saved.tokenize("[SEP] hen") == ["[", "sep", "]", "hen"]
    texts = [{"text": row[columns[0]], **({"text_pair": row[columns[1]]} if is_pair else {})} for row in rows[:5]]
    classify = pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    for text, line in zip(texts, read_predictions(tmp_path / "out"), strict=False):
        shares = {answer["label"]: answer["score"] for answer in classify(text, truncation=True, max_length=24)}
        assert shares == pytest.approx(line["probabilities"], abs=1e-5)


# --- Figures that are undefined, labels that are hidden --------------------------------------------------------------


def make_scores(num_rows: int) -> list[dict]:
    return [{"text": row["text"], "score": 0.5 + COLOURS.index(row["label"])} for row in make_rows(num_rows)]


def test_hidden_scores_are_no_labels(folder, tmp_path, monkeypatch, caplog):
    """STS-B's test split has -1.0 throughout."""
    files = {"train_file": write_jsonl(tmp_path / "train.jsonl", make_scores(40))}
    hidden = [{**row, "score": -1.0} for row in make_scores(5)]
    files["test_file"] = write_jsonl(tmp_path / "test.jsonl", hidden)
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **files, max_steps=2))
    assert "none of its 5 rows has a label" in caplog.text and "test_loss" not in results
    lines = read_predictions(tmp_path / "out")
    assert len(lines) == 5 and all(isinstance(line["prediction"], float) for line in lines)


def test_an_undefined_figure_is_null_in_files_and_named_on_screen(folder, tmp_path, monkeypatch, capsys):
    """All scores of the test and validation splits are the same: a correlation with them does not exist."""
    same = [{**row, "score": 0.5} for row in make_scores(6)]
    files = {"train_file": write_jsonl(tmp_path / "train.jsonl", make_scores(40))}
    files |= {f"{split}_file": write_jsonl(tmp_path / f"{split}.jsonl", same) for split in ("validation", "test")}
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **files, **steps, max_steps=2))
    assert results["test_pearson"] is None and results["eval_spearman"] is None and results["test_loss"] > 0
    screen = capsys.readouterr().out
    assert [line.split()[-1] for line in screen.splitlines() if "test_pearson" in line] == ["undefined"]
    for path in (tmp_path / "out").rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in a file"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| test_pearson | undefined |" in card


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 1], [1, 0]], r"holds both 0 and 1, for example \[0, 1\]"),
        ([[True, False], [False, True]], "holds both 0 and 1"),
        ([[1.0, 0.0], [0.0, 1.0]], "holds both 0 and 1"),
        ([[0, 0], [1, 0]], r"names a class twice: \[0, 0\]"),
    ],
)
def test_one_hot_rows_of_two_classes_are_refused(folder, tmp_path, monkeypatch, labels, message):
    rows = [{"text": row["text"], "label": labels[index % 2]} for index, row in enumerate(make_rows(20))]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    with pytest.raises(ValueError, match=f"{message}.*list the classes that apply"):
        run(monkeypatch, arguments(folder, tmp_path / "out", train_file=train, validation_split_percentage=0))


# --- A model that fits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("vocab_size=350", r"encoder.token_embedding.weight is \[320, 32\] there and \[350, 32\] by the config.*350"),
        ("num_hidden_layers=3", r"encoder.layers.2.*is not there"),
        ("num_hidden_layers=1", r"encoder.layers.1.*is a layer too many there"),
        ("intermediate_size=64", r"mlp.down_proj.weight is \[32, 128\] there and \[32, 64\]"),
    ],
)
def test_only_the_head_is_replaced(folder, tmp_path, monkeypatch, overrides, message):
    with pytest.raises(ValueError, match=f"only a head may be replaced.*{message}"):
        run(monkeypatch, arguments(folder, tmp_path / "out", config_overrides=overrides))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("overrides", ["vocab_size=330", "num_hidden_layers=1", "max_position_embeddings=30"])
def test_only_the_head_of_another_encoder_is_replaced(folder, tmp_path, monkeypatch, overrides):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=24, **sizes)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(tmp_path / "bert")
    options = {"model_name_or_path": tmp_path / "bert", "max_length": 20, "max_steps": 1}
    with pytest.raises(ValueError, match="only a head may be replaced: bert"):
        run(monkeypatch, arguments(folder, tmp_path / "out", **options, config_overrides=overrides))


def test_overrides_are_those_of_the_model_at_hand(folder, tmp_path, monkeypatch):
    """DistilBERT has an attention_dropout; T-JEPA calls it otherwise."""
    sizes = {"dim": 16, "hidden_dim": 16, "n_layers": 1, "n_heads": 2}
    config = DistilBertConfig(vocab_size=320, max_position_embeddings=32, **sizes)
    DistilBertModel(config).save_pretrained(tmp_path / "distilbert")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(tmp_path / "distilbert")
    options = {"config_overrides": "attention_dropout=0.2,seq_classif_dropout=1e-1", "max_steps": 1}
    run(monkeypatch, arguments(folder, tmp_path / "out", model_name_or_path=tmp_path / "distilbert", **options))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_dropout"], config["seq_classif_dropout"]) == (0.2, 0.1)
    with pytest.raises(ValueError, match="TJEPAConfig has no .'attention_dropout'"):
        run(monkeypatch, arguments(folder, tmp_path / "ours", **options))


def test_without_training_a_head_must_be_there(folder, tmp_path, monkeypatch):
    """And nothing is written over a run that the folder holds."""
    run(monkeypatch, arguments(folder, tmp_path / "out", max_steps=1))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="has no head for these labels: classifier.bias, classifier.weight would"):
        run(monkeypatch, arguments(folder, tmp_path / "out", do_train=False))
    with pytest.raises(FileNotFoundError, match="has no complete checkpoint"):
        run(monkeypatch, arguments(folder, tmp_path / "out", do_train=False, resume_from_checkpoint="last"))
    run(monkeypatch, arguments(folder, tmp_path / "out", do_train=False, model_name_or_path=tmp_path / "out"))
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"eval_results.json"}
    assert all(after[path] == content for path, content in before.items())


# --- Interrupted and resumed -----------------------------------------------------------------------------------------


def test_resumed_and_evaluated_from_a_checkpoint(folder, tmp_path, monkeypatch, caplog):
    """What was interrupted goes on from its last complete checkpoint to the same weights as without interruption."""
    options = {"save_strategy": "steps", "save_steps": 2, "test_file": folder / "test.jsonl"}
    run(monkeypatch, arguments(folder, tmp_path / "whole", **options, max_steps=4))

    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        Fault("forward", "exception", step=4).install(patch)
        run(patch, arguments(folder, tmp_path / "out", **options, max_steps=4))
    with caplog.at_level(logging.INFO, logger="tjepa"):
        resumed = run(
            monkeypatch, arguments(folder, tmp_path / "out", **options, max_steps=4, resume_from_checkpoint="last")
        )
    assert f"Resuming from {tmp_path / 'out' / 'checkpoint-2'}" in caplog.text
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(again[name].equal(tensor) for name, tensor in whole.items())

    checkpoint = {"do_train": False, "resume_from_checkpoint": "last"}
    evaluated = run(monkeypatch, arguments(folder, tmp_path / "out", **options, **checkpoint))
    assert evaluated["test_loss"] == pytest.approx(resumed["test_loss"], abs=1e-6)
    # finished already: what is left is written again, and not trained
    (tmp_path / "out" / "model.safetensors").unlink()
    same = arguments(folder, tmp_path / "out", **options, max_steps=4, resume_from_checkpoint="last")
    assert run(monkeypatch, same)["train_loss"] == resumed["train_loss"]
    assert all(load_file(tmp_path / "out" / "model.safetensors")[name].equal(again[name]) for name in again)

    renamed = [{**row, "label": f"not {row['label']}"} for row in make_rows(40)]
    data = {"train_file": write_jsonl(tmp_path / "renamed.jsonl", renamed), "max_steps": 4}
    for way in ({"resume_from_checkpoint": "last"}, checkpoint):  # the head knows other classes
        with pytest.raises(ValueError, match="tells the classes .*apart, and the data has .*'not "):
            run(monkeypatch, arguments(folder, tmp_path / "out", **{**data, **way}))


def test_resumed_with_other_rows(folder, tmp_path, monkeypatch, caplog):
    """A run goes on with them and says so; of a finished one the card would name rows that it was not trained on."""
    options = {"save_strategy": "steps", "save_steps": 2}
    run(monkeypatch, arguments(folder, tmp_path / "out", **options, max_steps=2))
    shutil.copy(folder / "train.jsonl", tmp_path / "copy.jsonl")
    again = {**options, "resume_from_checkpoint": "last", "train_file": tmp_path / "copy.jsonl"}
    with pytest.raises(ValueError, match=r"finished.*train_file was .*train\.jsonl and is .*copy\.jsonl"):
        run(monkeypatch, arguments(folder, tmp_path / "out", **again, max_steps=2))
    run(monkeypatch, arguments(folder, tmp_path / "out", **again, max_steps=4))
    message = rf"train_file is {tmp_path}/copy\.jsonl from here on; up to the checkpoint it was .*train\.jsonl"
    assert re.search(message, caplog.text)
    caplog.clear()
    run(monkeypatch, arguments(folder, tmp_path / "out", **again, max_steps=6))
    assert "from here on; up to" not in caplog.text
    for given in ({"optim": "adafactor"}, {"learning_rate": 0.5}, {"weight_decay": 0.3}):
        with pytest.raises(ValueError, match=f"goes on with its own optimizer: {next(iter(given))} was .* and is"):
            run(monkeypatch, arguments(folder, tmp_path / "out", **again, **given, max_steps=8))
        with pytest.raises(ValueError, match=f"finished.*{next(iter(given))} was .* and is"):
            run(monkeypatch, arguments(folder, tmp_path / "out", **again, **given, max_steps=6))


def test_a_checkpoint_may_be_the_folder_that_one_is_in(folder, tmp_path, monkeypatch, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    run(monkeypatch, arguments(folder, tmp_path / "out", **options, max_steps=2))
    monkeypatch.chdir(tmp_path / "out" / "checkpoint-2")
    again = {**options, "max_steps": 4, "resume_from_checkpoint": ".", "seed": 3}
    run(monkeypatch, arguments(folder, tmp_path / "out", **again))
    assert "seed is 3 from here on; up to the checkpoint it was the default" in caplog.text


def test_a_pair_may_be_a_text_and_itself(folder, tmp_path, monkeypatch):
    options = {"text_column": "text", "text_pair_column": "text", "max_steps": 1}
    assert run(monkeypatch, arguments(folder, tmp_path / "out", **options))["train_loss"] > 0


def test_of_a_run_that_is_replaced_no_figures_stay(folder, tmp_path, monkeypatch):
    """They would lie beside other weights; also where the new run is killed."""
    run(monkeypatch, arguments(folder, tmp_path / "out", test_file=folder / "test.jsonl", max_steps=2))
    (tmp_path / "out" / "eval_results.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        Fault("forward", "exception", step=2).install(patch)
        run(patch, arguments(folder, tmp_path / "out", max_steps=4, overwrite_output_dir=True))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names.isdisjoint({"all_results.json", "predict_results.jsonl", "eval_results.json"})


def test_the_lowest_error_is_the_best(folder, tmp_path, monkeypatch):
    rows = [{"text": row["text"], "label": len(row["text"]) / 10 + 0.01} for row in make_rows(40)]
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "mse", "max_steps": 3}
    run(monkeypatch, arguments(folder, tmp_path / "out", **best, train_file=write_jsonl(tmp_path / "a.jsonl", rows)))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(line["eval_mse"] for line in state["log_history"] if "eval_mse" in line)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric_for_best_model": "acc"}, "--metric_for_best_model acc: figures are loss, accuracy, f1_macro, mcc"),
        ({"max_steps": 0}, "--max_steps 0 .* a run without a step"),
        ({"fsdp": "full_shard"}, "--fsdp is for several processes, and this is one"),
        ({"eval_strategy": "epoch", "validation_split_percentage": 0}, "eval_strategy is epoch, but"),
    ],
)
def test_what_cannot_work_is_said_before_training(folder, tmp_path, monkeypatch, given, message):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, arguments(folder, tmp_path / "out", **given))


@pytest.mark.parametrize(
    "labels", [[[0, 2], [1]], [True, False], [1.0, 2.0]], ids=["lists", "booleans", "whole floats"]
)
def test_labels_in_a_column_of_the_name_that_models_take(folder, tmp_path, monkeypatch, labels):
    """datasets gives what is mapped to a column the type of the column that had its name."""
    rows = [{"text": row["text"], "labels": labels[index % 2]} for index, row in enumerate(make_rows(40))]
    kind = "single_label_classification" if isinstance(labels[0], float) else None
    options = {"train_file": write_jsonl(tmp_path / "a.jsonl", rows), "problem_type": kind, "max_steps": 1}
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert results["train_samples"] == 36 and results["train_loss"] > 0


def test_the_figures_by_which_checkpoints_are_chosen_are_those_of_the_metric(folder, tmp_path, monkeypatch):
    for kind, figures in TextTask.FIGURES.items():
        metric = evaluate.load(str(METRICS / "classification"), TextTask.METRIC_CONFIGURATIONS[kind])
        answers = [[0, 1], [1, 1]] if kind == "multi_label_classification" else [0, 1]
        assert {*metric.compute(predictions=answers, references=answers)} == {*figures}
    tags = [["B-A", "O"]]
    metric = evaluate.load(str(METRICS / "tagging"))
    assert {*metric.compute(predictions=tags, references=tags)} == {*WordTask.figures}


def test_the_card_names_the_step_of_the_best_weights(folder, tmp_path, monkeypatch):
    best = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 3.0}
    run(monkeypatch, arguments(folder, tmp_path / "out", **best, max_steps=3))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert state["best_global_step"] < 3  # a rate of 3 makes it worse
    assert f"those of step {state['best_global_step']} of 3, which had the best loss" in card
