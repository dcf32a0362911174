"""Fine-tuning on texts as a user does it: every kind of label, every kind of folder, and what happens to bad input."""

import csv
import json
import logging
import os
import subprocess
import sys

import datasets
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
)

from encoder_families import make_encoder
from finetuning_helpers import COLOURS, arguments, make_rows, run
from helpers import make_tiny_config, run_elsewhere, write_jsonl
from tjepa import TJEPAForSequenceClassification, TJEPAModel
from tjepa.downstream.arguments import ModelArguments
from tjepa.downstream.finetuning import find_max_length, freeze_encoder, load_tokenizer, separate_pairs
from tjepa.downstream.labels import find_class_names, find_problem_type, read_labels


# --- Every kind of label ---------------------------------------------------------------------------------------------


def test_classes_from_a_yaml_file_then_loaded_elsewhere(folder, tmp_path):
    values = dict(argument[2:].split("=", 1) for argument in arguments(folder, tmp_path / "out", max_steps=9999))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    launched = subprocess.run(
        [sys.executable, "-m", "tjepa.downstream.run_classification", str(tmp_path / "run.yaml")]
        + ["--test_file", str(folder / "test.jsonl"), "--max_steps", "40"],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert launched.returncode == 0, launched.stderr
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_accuracy"] > 0.9 and results["eval_accuracy"] > 0.9  # 0.33 would be chance
    assert results["train_samples"] == 180 and results["validation_samples"] == 20 and results["test_samples"] == 60
    assert "test_accuracy" in launched.stdout
    for line in ("texts in text, labels in label", "validation: 10% of the train rows", "train: 180 rows, 180 kept"):
        assert line in launched.stderr
    assert "3 classes" in launched.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in card and str(folder) not in card  # where files lay is nobody's business

    loaded = run_elsewhere(
        """
from transformers import AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model, info = AutoModelForSequenceClassification.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
assert not info["missing_keys"] and not info["unexpected_keys"], info
texts = ["the fox sees a green hen green", "a red fox runs home red"]
logits = model.eval()(**tokenizer(texts, return_tensors="pt", padding=True)).logits
print([model.config.id2label[index] for index in logits.argmax(-1).tolist()], model.config.problem_type)
""",
        tmp_path / "out",
        tmp_path,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split("\n")[-2] == "['green', 'red'] single_label_classification"


def test_several_labels(folder, tmp_path, monkeypatch):
    files = {"test_file": folder / "test.jsonl", "label_column": "colours"}
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **files, max_steps=60))
    assert set(results) >= {"test_accuracy", "test_f1_macro", "test_f1_micro"}
    assert results["test_f1_micro"] > 0.75  # the first of one or two colours is in the text
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "multi_label_classification"
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_regression_on_pairs(folder, tmp_path, monkeypatch):
    rows = [
        {"sentence1": row["text"], "sentence2": "the hen", "score": 0.5 + COLOURS.index(row["label"])}
        for row in make_rows(150)
    ]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    results = run(monkeypatch, arguments(folder, tmp_path / "out", train_file=train, max_steps=80))
    assert results["eval_pearson"] > 0.8 and "eval_spearman" in results
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.problem_type == "regression" and model.config.num_labels == 1
    # the saved tokenizer keeps the texts of a pair apart by itself, and single texts as they were
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    first, second = tokenizer("the fox")["input_ids"], tokenizer("a hen")["input_ids"]
    assert tokenizer("the fox", "a hen")["input_ids"] == [*first, tokenizer.eos_token_id, *second]


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (["a", None, "b"], "single_label_classification"),
        ([3, 5], "single_label_classification"),
        ([True, False], "single_label_classification"),
        (["1", "2"], "single_label_classification"),
        (["007", "010", "-1"], "single_label_classification"),
        (["None", "NA", "0.5"], "single_label_classification"),
        ([["a"], [], None], "multi_label_classification"),
        ([1.0, 2.5], "regression"),
        (["0.5", "2", ""], "regression"),
    ],
)
def test_problem_type_is_found_out(labels, problem_type):
    dataset = datasets.Dataset.from_dict({"label": labels})
    assert find_problem_type(dataset, "label", read_labels(dataset, "label")) == problem_type


@pytest.mark.parametrize("labels", [[1.0, 2.0, None], ["1.0", "2.0"]])
def test_whole_numbers_with_a_point_are_asked_about(labels):
    dataset = datasets.Dataset.from_dict({"label": labels})
    with pytest.raises(ValueError, match="classes or quantities.*--problem_type"):
        find_problem_type(dataset, "label", read_labels(dataset, "label"))


def test_problem_type_is_overridden(folder, tmp_path, monkeypatch):
    rows = [{**row, "label": COLOURS.index(row["label"])} for row in make_rows(60)]
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    results = run(
        monkeypatch, arguments(folder, tmp_path / "out", train_file=train, problem_type="regression", max_steps=2)
    )
    assert "eval_pearson" in results and "eval_accuracy" not in results


def test_class_labels_of_the_hub():
    features = datasets.Features({"label": datasets.ClassLabel(names=["pos", "neg"])})
    dataset = datasets.Dataset.from_dict({"label": [1, 0, -1, None]}, features=features)
    labels = read_labels(dataset, "label")
    assert labels == ["neg", "pos", None, None]  # -1 is how the Hub hides a label
    config = make_tiny_config()
    assert find_class_names(dataset, "label", labels, config) == ["pos", "neg"]
    plain = datasets.Dataset.from_dict({"label": [10, 9, -1]})
    assert find_class_names(plain, "label", [10, 9, -1], config) == ["-1", "9", "10"]  # by number
    config.id2label = {0: "9", 1: "10", 2: "-1"}  # a head that was trained with another order
    assert find_class_names(plain, "label", [10, 9, -1], config) == ["9", "10", "-1"]


# --- Every kind of folder, and frozen encoders -----------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_linear_probe_leaves_the_encoder_as_it_is(folder, tmp_path, monkeypatch, encoder):
    results = run(
        monkeypatch,
        arguments(folder, tmp_path / "out", freeze_encoder=True, encoder=encoder, max_steps=5),
    )
    before, after = (
        load_file(folder / "pretraining" / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    trained = {name for name in after if name.startswith("classifier.")}
    assert len(trained) == 2 and "eval_accuracy" in results
    for name in after.keys() - trained:
        assert after[name].equal(before[name.replace("encoder.", f"{encoder}_encoder.", 1)]), name


def test_frozen_encoder_has_no_dropout():
    config = make_tiny_config(hidden_dropout_prob=0.5, classifier_dropout=0.0)
    model, input_ids = TJEPAForSequenceClassification(config), torch.arange(20).view(2, 10)
    assert not model.train()(input_ids).logits.equal(model(input_ids).logits)
    freeze_encoder(model)
    model.train()  # as the Trainer does before every step
    assert model.training and model.dropout.training and not any(part.training for part in model.encoder.modules())
    assert model(input_ids).logits.equal(model(input_ids).logits)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    freeze_encoder(model, new={"classifier.weight", "encoder.final_norm.weight"})  # that the folder lacks
    assert model.encoder.final_norm.weight.requires_grad and not model.encoder.final_norm.bias.requires_grad


def test_fine_tuned_again_and_evaluated_alone(folder, tmp_path, monkeypatch):
    test = {"test_file": folder / "test.jsonl"}
    options = {"config_overrides": "classifier_pooling=attention", "trust_remote_code": True}
    first = run(
        monkeypatch,
        arguments(folder, tmp_path / "first", model_name_or_path=folder / "encoder", **options, **test, max_steps=20),
    )
    assert "pooling.score.weight" in load_file(tmp_path / "first" / "model.safetensors")
    assert (tmp_path / "first" / "modeling_tjepa.py").is_file()
    again = run(
        monkeypatch,
        arguments(folder, tmp_path / "again", model_name_or_path=tmp_path / "first", **test, do_train=False),
    )
    assert again["test_loss"] == pytest.approx(first["test_loss"], abs=1e-5)
    # figures and predictions, no weights
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"eval_results.json", "predict_results.jsonl"}
    other_task = {"label_column": "colours", "max_steps": 1}  # another kind of label, a head of another kind
    run(monkeypatch, arguments(folder, tmp_path / "third", model_name_or_path=tmp_path / "first", **other_task))


def test_another_encoder_of_transformers(folder, tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=24, **sizes)).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(tmp_path / "bert")
    bert = {"model_name_or_path": tmp_path / "bert", "freeze_encoder": True}
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **bert, max_steps=2, max_length=99))
    assert "eval_accuracy" in results
    with pytest.raises(ValueError, match="--encoder context is for T-JEPA"):
        run(monkeypatch, arguments(folder, tmp_path / "other", **bert, encoder="context"))


def test_output_folder_that_holds_a_run(folder, tmp_path, monkeypatch):
    run(monkeypatch, arguments(folder, tmp_path / "out", max_steps=1))
    with pytest.raises(FileExistsError, match="--overwrite_output_dir"):
        run(monkeypatch, arguments(folder, tmp_path / "out", max_steps=1))
    (tmp_path / "out" / "run.json").write_text("{}")
    with pytest.raises(FileExistsError, match="is the folder of a pretraining run.*choose another one"):
        run(monkeypatch, arguments(folder, tmp_path / "out", max_steps=1, overwrite_output_dir=True))


def test_rows_that_stand_twice_are_told(folder, tmp_path, monkeypatch, caplog):
    rows = [{"text": f"{color} {n}", "label": color} for n in range(10) for color in ("red", "blue")]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:3], {"text": "a red one", "label": "red"}]))
    options = {"train_file": train, "test_file": test, "max_steps": 1}
    run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert "3 of the 4 rows that the test split is judged by have an input of the train split" in caplog.text
    assert "validation split is judged by" not in caplog.text
    train.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    run(monkeypatch, arguments(folder, tmp_path / "twice", **options))
    assert "rows that the validation split is judged by have an input" in caplog.text


# --- Rows that cannot be used, and texts that are too long ----------------------------------------------------------


def test_bad_rows_are_dropped_and_counted(folder, tmp_path, monkeypatch, caplog):
    bad = [{"text": None, "label": "red"}, {"text": " ", "label": "red"}, {"text": "red", "label": None}]
    train = write_jsonl(tmp_path / "train.jsonl", [*bad, *make_rows(40), {"text": "red", "label": ""}])
    test = write_jsonl(tmp_path / "test.jsonl", [*make_rows(5), bad[1], {"text": "fox " * 100, "label": "red"}])
    files = {"train_file": train, "test_file": test, "validation_split_percentage": 0}
    with caplog.at_level(logging.INFO, logger="tjepa"):
        results = run(monkeypatch, arguments(folder, tmp_path / "out", **files, max_steps=1))
    assert (results["train_samples"], results["train_dropped"], results["train_truncated"]) == (40, 4, 0)
    assert (results["test_samples"], results["test_dropped"], results["test_truncated"]) == (6, 1, 1)
    assert "train: 44 rows, 40 kept; dropped: label missing 2, null 1, empty or whitespace only 1" in caplog.text
    assert "test: 1 of 6 texts are longer than 32 tokens and were cut" in caplog.text
    assert "eval_loss" not in results


def test_test_split_without_labels_is_not_evaluated(folder, tmp_path, monkeypatch, caplog):
    test = write_jsonl(tmp_path / "test.jsonl", [{"text": "a fox", "label": None}] * 3)
    results = run(monkeypatch, arguments(folder, tmp_path / "out", test_file=test, max_steps=1))
    assert "none of its 3 rows has a label" in caplog.text
    assert "test_loss" not in results and "eval_loss" in results


def test_dataset_in_a_folder(folder, tmp_path, monkeypatch, caplog):
    """As on the Hub: classes with names and an order of their own, more splits than are used, a hidden test."""
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=COLOURS)})
    rows = [{"sentence": row["text"], "label": COLOURS.index(row["label"])} for row in make_rows(40)]
    hidden = [{**row, "label": -1} for row in rows[:5]]
    splits = {"train": rows[10:], "validation": rows[:10], "test": hidden, "unsupervised": hidden}
    splits = {name: datasets.Dataset.from_list(split, features=features) for name, split in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dataset")
    options = {"train_file": None, "dataset_name": tmp_path / "dataset", "max_steps": 1}
    with caplog.at_level(logging.INFO, logger="tjepa"):
        results = run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert results["train_samples"] == 30 and "eval_accuracy" in results and "test_accuracy" not in results
    assert "texts in sentence" in caplog.text and "the split(s) ['unsupervised'] are not used" in caplog.text
    assert (
        list(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label.values()) == COLOURS
    )


def test_limits(folder, tmp_path, monkeypatch):
    limits = {"max_train_samples": 30, "max_eval_samples": 10, "max_predict_samples": 20, "max_length": 8}
    results = run(
        monkeypatch, arguments(folder, tmp_path / "out", test_file=folder / "test.jsonl", **limits, max_steps=1)
    )
    assert [results[f"{split}_samples"] for split in ("train", "validation", "test")] == [30, 10, 20]
    assert results["train_truncated"] == 30


def test_csv_with_a_missing_label(folder, tmp_path, monkeypatch):
    """A csv holds text: classes stay as they are written, and only an empty field is missing."""
    classes = {"red": "007", "green": "None", "blue": "NA"}
    with open(tmp_path / "train.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([[row["text"], classes[row["label"]]] for row in make_rows(30)] + [["a fox", ""]])
    options = {"train_file": tmp_path / "train.csv", "max_steps": 1}
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert results["train_dropped"] + results["validation_dropped"] == 1
    names = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label
    assert list(names.values()) == ["007", "NA", "None"]


TEXT = "the fox runs"


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([{"text": TEXT, "label": "a"}] * 4, {}, r"one class only, \['a'\]"),
        ([{"text": TEXT, "label": 1.5}] * 4, {}, "Every label of the train split is 1.5"),
        ([{"text": TEXT, "label": None}] * 4, {}, "No row of the train split has a label"),
        ([{"text": "", "label": "a"}, {"text": " ", "label": "b"}], {}, "Nothing is left of the train split.*empty"),
        ([{"text": 7, "label": "a"}, {"text": 8, "label": "b"}], {}, "not a string 2"),
        ([{"text": TEXT, "label": [0, 1, 0]}] * 4, {}, r"names a class twice: \[0, 1, 0\]"),
        ([{"text": TEXT, "label": ["a"]}] * 4, {"problem_type": "regression"}, "must not be a list"),
        ([{"text": TEXT, "label": "a"}] * 4, {"problem_type": "multi_label_classification"}, "be a list of classes"),
        ([{"text": TEXT, "label": "a"}] * 4, {"problem_type": "regression"}, "label is not a finite number 4"),
        ([{"body": TEXT, "label": "a"}] * 4, {}, r"--text_column.*\['body', 'label'\], and none of the usual names"),
        ([{"x": 1}], {}, r"'question', 'sentence', 'text', 'content'\]"),  # each once
        ([{"text": TEXT, "label": "a", "score": 1}] * 4, {}, r"--label_column.*\['label', 'score'\] are all usual"),
        ([{"text": TEXT, "label": "a"}] * 4, {"text_column": "body"}, r"no column 'body'; it has \['label', 'text'\]"),
        ([{"text": TEXT, "label": "a"}] * 4, {"text_pair_column": "label"}, "pass --text_column, the first"),
    ],
)
def test_data_that_is_refused(folder, tmp_path, monkeypatch, rows, overrides, message):
    train = write_jsonl(tmp_path / "train.jsonl", rows)
    options = {"train_file": train, "validation_split_percentage": 0, **overrides}
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, arguments(folder, tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_table_without_rows_is_refused(folder, tmp_path, monkeypatch, split):
    (tmp_path / "a.csv").write_text("text,label\n")
    with pytest.raises(ValueError, match=f"Nothing is left of the {split} split: it has no rows"):
        run(monkeypatch, arguments(folder, tmp_path / "out", **{f"{split}_file": tmp_path / "a.csv"}))


def test_label_sets_that_differ_are_refused(folder, tmp_path, monkeypatch):
    rows = [{"text": TEXT, "label": label} for label in ("red", "purple", "purple", "pink")]
    test = write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(ValueError, match=r"test split has labels.*\['pink', 'purple'\], 3 times.*\['blue', 'green'"):
        run(monkeypatch, arguments(folder, tmp_path / "out", test_file=test))
    missing = write_jsonl(tmp_path / "columns.jsonl", [{"text": TEXT, "target": "red"}])  # is target the label?
    with pytest.raises(ValueError, match=r"The test split has no column 'label'; it has \['target', 'text'\]"):
        run(monkeypatch, arguments(folder, tmp_path / "out", test_file=missing))
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [{"text": TEXT, "label": label} for label in (0.5, 1.5, 2.5)])
    with pytest.raises(ValueError, match="left of the test split: dropped label is not a finite number 4"):
        run(monkeypatch, arguments(folder, tmp_path / "out", train_file=numbers, test_file=test))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"model_name_or_path": "nothing"}, ValueError, "is not the folder of a model: it has no config.json"),
        ({"model_name_or_path": "encoder", "encoder": "context"}, ValueError, "has no context encoder"),
        ({"tokenizer_name": "nothing"}, ValueError, "no tokenizer could be loaded .*Pass a folder or a name"),
        ({"config_overrides": "classifier_poling=mean"}, ValueError, "has no .'classifier_poling'"),
        ({"train_file": None}, ValueError, "either --dataset_name"),
        ({"train_file": None, "dataset_name": "x", "test_file": "y"}, ValueError, "not used with --dataset_name"),
        ({"train_file": "missing.jsonl"}, FileNotFoundError, "--train_file: no file"),
        ({"validation_split_percentage": 100}, ValueError, "less than 100"),
        ({"validation_split_percentage": 0, "eval_strategy": "epoch"}, ValueError, "there is no validation split"),
        ({"max_train_samples": 0}, ValueError, "max_train_samples is 0"),
    ],
)
def test_arguments_that_are_refused(folder, tmp_path, monkeypatch, overrides, error, message):
    (folder / "nothing").mkdir(exist_ok=True)
    for name in ("model_name_or_path", "tokenizer_name"):
        if name in overrides:
            overrides = {**overrides, name: folder / overrides[name]}
    with pytest.raises(error, match=message):
        run(monkeypatch, arguments(folder, tmp_path / "out", **overrides))
    assert not (tmp_path / "out" / "model.safetensors").exists()


# --- Lengths, tokenizers, metrics ------------------------------------------------------------------------------------


def test_max_length(folder, caplog):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")  # for 32 tokens
    model = TJEPAModel(make_tiny_config(max_position_embeddings=20))
    assert find_max_length(None, tokenizer, model) == 20
    assert find_max_length(8, tokenizer, model) == 8
    model.config.max_position_embeddings = 32  # rotary positions go on
    assert find_max_length(99, tokenizer, model) == model.config.max_position_embeddings == 99
    assert tokenizer.model_max_length == 99
    tokenizer.model_max_length = 999
    for name, longest in (("bert", 160), ("roberta", 158), ("mpnet", 158)):  # of 160 positions; two count from 2
        assert find_max_length(999, tokenizer, make_encoder(name)) == longest
        assert f"{longest} it is" in caplog.text


def test_tokenizer_without_padding_or_separator(folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    bare.save_pretrained(tmp_path / "bare")
    args = ModelArguments(model_name_or_path=str(tmp_path / "bare"))
    with pytest.raises(ValueError, match="no token to pad with"):
        load_tokenizer(args, make_tiny_config())
    bare.add_special_tokens({"pad_token": "<pad>"})
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="nothing between the texts of a pair"):
        separate_pairs(load_tokenizer(args, make_tiny_config()))
    bare.pad_token, bare.eos_token = None, "</s>"
    bare.save_pretrained(tmp_path / "eos")
    config = make_tiny_config()
    args = ModelArguments(model_name_or_path=str(tmp_path / "eos"))
    loaded = load_tokenizer(args, config)
    separate_pairs(loaded)
    assert loaded.pad_token == "</s>" and loaded.convert_ids_to_tokens(loaded("a", "b")["input_ids"])[1] == "</s>"
    assert config.pad_token_id == bare.eos_token_id


def test_sst2(shared_folder, folder, tmp_path, monkeypatch):
    """Real sentences: the columns are found, long ones are cut, and the loss falls."""
    data = shared_folder / "data" / "eval"
    options = {"train_file": data / "sst2-train.jsonl", "test_file": data / "sst2-test.jsonl", "logging_steps": 10}
    limits = {"max_train_samples": 600, "max_predict_samples": 100, "max_length": 16}
    results = run(monkeypatch, arguments(folder, tmp_path / "out", **options, **limits, max_steps=20))
    assert results["test_samples"] == 100 and results["train_truncated"] > 0 and 0 <= results["test_accuracy"] <= 1
    assert TJEPAModel.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2
