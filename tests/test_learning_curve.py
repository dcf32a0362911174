"""benchmarks/learning_curve.py on generated words: it trains, judges, restarts and draws. No figure is judged."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tjepa import TJEPAConfig
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.downstream.probe import ProbeTask
from tjepa.run_pretraining import PretrainingArguments


SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "learning_curve.py"
RECIPES = """
defaults: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 4, per_device_train_batch_size: 4}
hybrid: {variance_covariance_weight: 1.0, token_prediction_weight: 1.0}
control: {variance_covariance_weight: 1.0, token_prediction_weight: 1.0, jepa_weight: 0.0}
mlm: {objective: mlm, mask_ratio: 0.3, learning_rate: 2.0e-3}
"""


@pytest.fixture(scope="module")
def learning_curve():
    spec = importlib.util.spec_from_file_location("learning_curve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def sentence(index: int) -> str:
    kind = ("red green blue", "seven eight nine")[index % 2]
    return f"{kind} number {index * 37 % 101} and {index * 53 % 89} of many {kind}"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([sentence(index) for index in range(60)], vocab_size=320, model_max_length=64)


@pytest.fixture(scope="module")
def arguments(tokenizer, tmp_path_factory) -> list[str]:
    """A prepared dataset, data sets of every kind, and recipes."""
    folder = tmp_path_factory.mktemp("learning_curve")
    documents = tokenizer([sentence(index) for index in range(12)])["input_ids"]
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": documents})}).save_to_disk(folder / "data")
    tokenizer.save_pretrained(folder / "data")
    rows = {
        "colour-train": [{"text": sentence(i), "label": i % 2} for i in range(40)],
        "colour-test": [{"text": sentence(i), "label": i % 2} for i in range(40, 60)],
        "pairs-test": [{"sentence1": sentence(i), "sentence2": sentence(2 * i), "score": i % 5} for i in range(12)],
        "tags-train": [{"tokens": sentence(i).split(), "word_tags": [*"ABABABABABABA"]} for i in range(20)],
        "tags-test": [{"tokens": sentence(i).split(), "word_tags": [*"ABABABABABABA"]} for i in range(20, 25)],
    }
    (folder / "eval").mkdir()
    for name, lines in rows.items():
        for line in lines:
            if "word_tags" in line:
                line["word_tags"] = line["word_tags"][: len(line["tokens"])]
        (folder / "eval" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipes.yaml").write_text(RECIPES)
    options = {"dataset_name": "data", "data_dir": "eval", "recipes": "recipes.yaml"}
    return [part for name, path in options.items() for part in (f"--{name}", str(folder / path))]


def test_runs_finish_restart_and_are_drawn(learning_curve, arguments, tmp_path, monkeypatch, capsys):
    def run(*options: str) -> dict:
        given = [*arguments, "--output_dir", str(tmp_path), "--tokens", "700", "--num_checkpoints", "2", *options]
        monkeypatch.setattr(sys, "argv", ["learning_curve.py", *given])
        learning_curve.main()
        return json.loads((tmp_path / "result.json").read_text())

    first = run("--only", "mlm", "--variant", "l1=hybrid,loss_type=l1,final_ema_momentum=0.9")
    assert set(first["runs"]) == {"TF-IDF", "untrained", "l1", "mlm"}
    for name in ("l1", "mlm"):
        ((halfway, end),) = first["runs"][name]
        assert end["step"] == pytest.approx(2 * halfway["step"], abs=1)
        assert end["tokens"] == pytest.approx(700, rel=0.35) and end["seconds"] > halfway["seconds"] > 0
        assert np.isfinite(end["loss"]) and 0 < end["rank"] <= 1
        measures = ("colour/linear_probe", "pairs/spearman_whitened", "tags/linear_probe")
        assert end["score"] == pytest.approx(np.mean([end[measure] for measure in measures]))
    assert first["runs"]["l1"][0][-1]["tokens"] == first["runs"]["mlm"][0][-1]["tokens"]  # the same documents
    assert (tmp_path / "learning_curve.png").stat().st_size > 10_000

    # the same again trains nothing; another seed is added, the finished one kept
    trained = []
    monkeypatch.setattr(learning_curve, "train_and_judge", lambda recipe, seed, *_: trained.append(seed) or first_mlm)
    first_mlm = first["runs"]["mlm"][0]
    variant = ["--only", "mlm", "--variant", "l1=hybrid,loss_type=l1,final_ema_momentum=9e-1"]
    assert run(*variant)["runs"] == first["runs"] and not trained
    both_seeds = run(*variant, "--seeds", "0", "1")["runs"]
    assert trained == [1, 1] and both_seeds["mlm"] == [first_mlm, first_mlm]
    assert "±" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("--tasks", "colour", "colours")
    assert "has no ['colours'], only ['colour', 'pairs', 'tags']" in capsys.readouterr().err
    with pytest.raises(ValueError, match="l1-seed0.json was made with other settings"):
        run("--only", "mlm", "--variant", "l1=hybrid,loss_type=l2")


def objective(learning_curve, tokenizer, **values):
    recipe = learning_curve.Recipe.from_dict("test", values)
    torch.manual_seed(0)
    config = TJEPAConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    for name, value in recipe.config.items():
        setattr(config, name, value)
    args = PretrainingArguments(output_dir="unused", use_cpu=True)
    return learning_curve.OBJECTIVES[recipe.objective](recipe, config, args, tokenizer)


def test_minimal_pairs_are_judged_with_the_token_head(learning_curve, tokenizer):
    columns = {
        "paradigm": ["x"] * 4,
        "good": [sentence(i) for i in range(4)],
        "bad": [sentence(i) for i in range(4, 8)],
    }
    pairs = ProbeTask("grammar", "minimal pairs", {"test": columns})
    texts = ProbeTask("pairs", "similarity", {"test": {"sentence1": columns["good"], "sentence2": columns["bad"]}})
    texts.splits["test"]["score"] = [0.0, 1.0, 2.0, 3.0]
    for values in ({"objective": "mlm"}, {"token_prediction_weight": 1.0}):
        figures = learning_curve.judge(objective(learning_curve, tokenizer, **values), tokenizer, [pairs, texts], 64)
        expected = (figures["grammar/accuracy"] + figures["pairs/spearman_whitened"]) / 2
        assert figures["score"] == pytest.approx(expected)
    without = learning_curve.judge(objective(learning_curve, tokenizer), tokenizer, [pairs, texts], 64)
    assert "grammar/accuracy" not in without and without["score"] == without["pairs/spearman_whitened"]


def examples(tokenizer) -> list[dict]:
    texts = [sentence(index) for index in range(6)]
    ids = tokenizer(texts)["input_ids"]
    return [{"input_ids": np.array(row), "document_index": i, "epoch": 0} for i, row in enumerate(ids)]


def test_packed_mlm_equals_the_models_own_loss(learning_curve, tokenizer):
    mlm = objective(learning_curve, tokenizer, objective="mlm", mask_ratio=0.3)
    seen = []
    mask_tokens = mlm.collator.torch_mask_tokens
    mlm.collator.torch_mask_tokens = lambda *given: seen.append(mask_tokens(*given)) or seen[-1]
    loss = mlm.loss(examples(tokenizer))
    ((input_ids, labels),) = seen
    assert 0.1 < (labels >= 0).float().mean() < 0.5 and tokenizer.mask_token_id in input_ids

    lengths = sorted(len(example["input_ids"]) for example in examples(tokenizer))
    logits = [mlm.model(row[None]).logits[0] for row in input_ids.split(lengths)]  # document by document
    torch.testing.assert_close(loss, F.cross_entropy(torch.cat(logits), labels), rtol=1e-5, atol=1e-5)


def test_mlm_without_random_tokens_masks_or_keeps(learning_curve, tokenizer):
    ids = torch.randint(5, len(tokenizer), (4000,))
    for values, is_random in (({"random_ratio": 0.0}, False), ({}, True)):
        mlm = objective(learning_curve, tokenizer, objective="mlm", mask_ratio=0.5, **values)
        seen, labels = mlm.collator.torch_mask_tokens(ids.clone(), torch.zeros_like(ids))
        others = (seen != ids) & (seen != tokenizer.mask_token_id)
        assert others.any() == is_random and 0.7 < (seen == tokenizer.mask_token_id)[labels >= 0].float().mean() < 0.9


def test_the_masking_rate_of_mlm_falls(learning_curve, tokenizer):
    values = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "per_device_train_batch_size": 4}
    values |= {"objective": "mlm", "mask_ratio": 0.4, "final_mask_ratio": 0.1}
    recipe = learning_curve.Recipe.from_dict("falling", values)
    documents = [np.array(ids) for ids in tokenizer([sentence(index) for index in range(12)])["input_ids"]]
    training = learning_curve.Training(recipe, documents, tokenizer, seed=0, num_steps=3)
    rates = [training.objective.collator.mlm_probability for _ in training]
    assert rates == pytest.approx([0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    ("values", "causal"),
    [({"causal_first": 0.5}, [1, 1, 1, 0, 0, 0]), ({"causal_mixed": 1 / 3}, [0, 0, 1, 0, 0, 1])],
)
def test_causal_steps_of_mlm(learning_curve, tokenizer, values, causal):
    """In them a token's state and its prediction of the next one know nothing of what follows."""
    mlm = objective(learning_curve, tokenizer, objective="mlm", **values)
    is_causal = []
    for step in range(6):
        is_causal.append(int(mlm.is_causal))
        mlm.after_step(step, 6)
    assert is_causal == causal
    mlm.is_causal = True
    first, *others = sorted((example["input_ids"] for example in examples(tokenizer)), key=len)
    changed = np.append(first[:-1], (first[-1] + 1) % len(tokenizer))
    states = [causal_states(learning_curve, mlm, document) for document in (first, changed, *others)]
    torch.testing.assert_close(states[0][:-1], states[1][:-1], rtol=0, atol=1e-6)
    logits = mlm.model.token_head(
        torch.cat([states[0][:-1], *(of[:-1] for of in states[2:])]), mlm.model.decoder.weight
    )
    following = np.concatenate([document[1:] for document in (first, *others)])
    expected = F.cross_entropy(logits, torch.from_numpy(following))
    torch.testing.assert_close(mlm.loss(examples(tokenizer)), expected, rtol=1e-5, atol=1e-5)


def causal_states(learning_curve, mlm, document: np.ndarray) -> torch.Tensor:
    places = torch.arange(len(document))[None]
    layers, views = learning_curve.tjepa.layers_tjepa, learning_curve.CausalViews
    with learning_curve.mock.patch.object(layers, "PackedViews", views):
        output = mlm.encoder(torch.as_tensor(document)[None], position_ids=places, view_ids=torch.zeros_like(places))
    return output.last_hidden_state[0]


def test_bf16_is_autocast(learning_curve, tokenizer):
    documents = [np.array(ids) for ids in tokenizer([sentence(index) for index in range(12)])["input_ids"]]
    losses = []
    for bf16 in (False, True):
        values = {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "per_device_train_batch_size": 4,
        }
        recipe = learning_curve.Recipe.from_dict("x", {**values, "token_prediction_weight": 1.0, "bf16": bf16})
        training = learning_curve.Training(recipe, documents, tokenizer, seed=0, num_steps=2)
        losses.append([step["loss"] for step in training])
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)


def test_muon_trains_the_matrices_of_the_layers(learning_curve, tokenizer):
    values = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "per_device_train_batch_size": 4}
    recipe = learning_curve.Recipe.from_dict("muon", {**values, "objective": "mlm", "muon": 3.0})
    documents = [np.array(ids) for ids in tokenizer([sentence(index) for index in range(12)])["input_ids"]]
    training = learning_curve.Training(recipe, documents, tokenizer, seed=0, num_steps=2)
    model = training.objective.model
    optimizer = learning_curve.create_optimizer(model, training.args)
    muon = learning_curve.split_off_muon(optimizer, model.encoder.layers, 3.0, training.args)
    assert muon.defaults["lr"] == pytest.approx(3.0 * training.args.learning_rate)
    of_muon, others = ({id(p) for g in opt.param_groups for p in g["params"]} for opt in (muon, optimizer))
    assert of_muon == {id(p) for p in model.encoder.layers.parameters() if p.ndim == 2} and not of_muon & others
    assert of_muon | others == {id(p) for p in model.parameters()}
    before = [p.clone() for p in model.parameters()]
    assert len([step["loss"] for step in training]) == 2
    assert all(not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True) if p.ndim == 2)


def test_the_control_is_the_recipe_without_its_tjepa_loss(learning_curve, tokenizer):
    weights = {"variance_covariance_weight": 1.0, "token_prediction_weight": 0.5}
    control = objective(learning_curve, tokenizer, **weights, jepa_weight=0.0)
    output = control.model(**control.collator(examples(tokenizer)))
    expected = output.variance_covariance_loss + 0.5 * output.token_prediction_loss
    torch.testing.assert_close(control.loss(examples(tokenizer)), expected)


def test_validation_takes_nothing_from_the_test_part(learning_curve):
    texts = [str(index) for index in range(50)]
    task = ProbeTask("t", "classification", {s: {"text": [f"{s} {t}" for t in texts]} for s in ("train", "test")})
    task.splits["train"]["label"] = task.splits["test"]["label"] = list(range(50))
    splits = learning_curve.for_validation(task).splits
    assert len(splits["test"]["text"]) == 10 and len(splits["train"]["text"]) == 40
    assert sorted(splits["test"]["text"] + splits["train"]["text"]) == sorted(task.splits["train"]["text"])

    pairs = ProbeTask("p", "similarity", {"test": {"sentence1": texts, "sentence2": texts, "score": list(range(50))}})
    chosen, reported = (learning_curve.part_of_test(pairs, part).splits["test"]["score"] for part in (True, False))
    assert len(chosen) == 16 and sorted(chosen + reported) == list(range(50))

    columns = {
        "sentence1": texts[:25] + texts[25:],
        "sentence2": texts[25:] + texts[:25],
        "label": [0] * 25 + [1] * 25,
    }
    order = ProbeTask("o", "pair order", {"train": columns, "test": columns})
    splits = learning_curve.for_validation(order).splits
    assert len(splits["test"]["label"]) == 10  # both orders of a pair are on the same side
    assert set(splits["test"]["sentence1"]).isdisjoint(splits["train"]["sentence2"])


def test_recipes_with_errors_are_refused(learning_curve):
    with pytest.raises(ValueError, match=r"Recipe x has the unknown keys \['mask_rate'\]"):
        learning_curve.Recipe.from_dict("x", {"mask_rate": 0.3})
    with pytest.raises(ValueError, match="objective must be tjepa or mlm"):
        learning_curve.Recipe.from_dict("x", {"objective": "gpt"})
    path = SCRIPT.with_name("learning_recipes.yaml")
    with pytest.raises(ValueError, match="--variant is NAME=BASE"):
        learning_curve.load_recipes(path, ["new=nowhere,learning_rate=1"], None)
    with pytest.raises(ValueError, match=r"there is no recipe \['nothing'\]"):
        learning_curve.load_recipes(path, [], ["nothing"])
    for file in (path, SCRIPT.with_name("learning_screen.yaml")):
        for name, values in learning_curve.load_recipes(file, [], None).items():
            learning_curve.Recipe.from_dict(name, values)  # what is in the file is right
