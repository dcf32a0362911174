"""Minimal pairs: scores against plain loops, and grammar that is learned is found, with an untrained control."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, PreTrainedTokenizerFast

from helpers import make_tiny_config, make_word_tokenizer, write_jsonl
from tjepa import TJEPAForMaskedLM, TJEPAForPreTraining, TJEPAModel
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy
from tjepa.downstream import run_probing
from tjepa.downstream.probe import ProbeTask, probe_tasks
from tjepa.downstream.run_probing import load_tasks
from tjepa.downstream.sentence_scores import prefers_good, score_texts, why_it_cannot_score


WORDS = ["one", "two", "fox", "foxes", "red", "old", "the", "near", "far", "so"]
PIECES = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
ONE_TOKEN = MaskingStrategy(target_block_size_mean=1, target_block_num=1, max_target_mask_ratio=0.5)


@pytest.fixture(scope="module")
def tokenizer():
    """As BERT's: [CLS] and [SEP] around a text."""
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return make_word_tokenizer(PIECES, model_max_length=16, **special)


def make_bert(kind=BertForMaskedLM):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return kind(BertConfig(vocab_size=len(PIECES), initializer_range=0.5, **sizes))


def make_ours(kind=TJEPAForPreTraining, **options):
    torch.manual_seed(0)
    return kind(make_tiny_config(vocab_size=len(PIECES), **options))


def sentence(rng: np.random.Generator) -> tuple[str, str]:
    """ "one ... fox" or "two ... foxes" with any words between, and its wrong twin, of the same words all in all."""
    number = int(rng.integers(2))
    between = list(rng.choice(WORDS[4:], size=rng.integers(1, 3)))
    return tuple(" ".join([WORDS[number], *between, noun]) for noun in (WORDS[2 + number], WORDS[3 - number]))


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    good, bad = map(list, zip(*(sentence(rng) for _ in range(60)), strict=True))
    return ProbeTask(
        "grammar", "minimal pairs", {"test": {"paradigm": ["a"] * 40 + ["b"] * 20, "good": good, "bad": bad}}
    )


TEXTS = ["one red fox", "two old near foxes", "one so", "far far red the old fox", "so near so"]


@pytest.mark.parametrize("kind", [BertForMaskedLM, TJEPAForMaskedLM])
def test_the_score_of_a_masked_language_model_is_that_of_a_plain_loop(tokenizer, kind):
    model = (make_bert() if kind is BertForMaskedLM else make_ours(kind)).train()
    scores = score_texts(model, tokenizer, TEXTS, max_length=16, batch_size=4)
    assert model.training and scores.dtype == torch.float64
    model.eval()
    specials = 1 if kind is BertForMaskedLM else 0
    for text, score in zip(TEXTS, scores.tolist(), strict=True):
        ids = torch.tensor([tokenizer(text, add_special_tokens=bool(specials))["input_ids"]])
        expected = 0.0
        for place in range(specials, ids.shape[1] - specials):
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            with torch.no_grad():
                logits = model(input_ids=masked, attention_mask=torch.ones_like(ids)).logits
            expected += logits[0, place].log_softmax(-1)[ids[0, place]].item()
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("predictor_type", ["self_attention", "boundary", "in_place"])
def test_the_score_of_a_pretraining_model_is_its_own_loss_at_each_token(tokenizer, predictor_type):
    model = make_ours(token_prediction_weight=1.0, predictor_type=predictor_type, mask_token_id=3).eval()
    scores = score_texts(model, tokenizer, TEXTS, max_length=16, batch_size=4)
    collator = DataCollatorForTJEPA([ONE_TOKEN])
    collator.fit_to(model.config)
    for text, score in zip(TEXTS[:3], scores.tolist(), strict=False):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        losses = {}
        for epoch in range(25):  # until each token was the hidden one
            batch = collator([{"input_ids": ids, "document_index": 0, "epoch": epoch}])
            with torch.no_grad():
                losses[int(batch["label_indices"])] = model(**batch).token_prediction_loss.item()
        assert len(losses) == len(ids) and score == pytest.approx(-sum(losses.values()), abs=1e-4)


def test_a_denoising_model_is_scored_with_masks_by_the_encoder_that_trained(tokenizer):
    model = make_ours(denoising_weight=1.0).eval()
    before = score_texts(model, tokenizer, TEXTS, max_length=16)
    head = make_ours(TJEPAForMaskedLM).eval()
    head.encoder.load_state_dict(model.context_encoder.state_dict())
    head.token_head.load_state_dict(model.token_head.state_dict())
    torch.testing.assert_close(before, score_texts(head, tokenizer, TEXTS, max_length=16), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        model.target_encoder.token_embedding.weight.zero_()
    assert before.equal(score_texts(model, tokenizer, TEXTS, max_length=16))


def test_agreement_is_learned_and_found(tokenizer, pairs):
    """The words of good and bad sentences are as frequent: only who stands with whom tells them apart."""
    model = make_ours(token_prediction_weight=1.0, initializer_range=0.1, predictor_num_hidden_layers=1)
    untrained = probe_tasks(model, tokenizer, [pairs], max_length=16)["grammar/accuracy"]
    assert 0.2 < untrained < 0.8
    rng, collator = np.random.default_rng(1), DataCollatorForTJEPA([ONE_TOKEN])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(100):
        texts = [sentence(rng)[0] for _ in range(32)]
        rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
        batch = collator([{"input_ids": ids, "document_index": i, "epoch": step} for i, ids in enumerate(rows)])
        model(**batch).token_prediction_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert probe_tasks(model, tokenizer, [pairs], max_length=16) == {"grammar/accuracy": 1.0}


def test_the_mean_over_paradigms():
    scores = torch.tensor([2.0, 1.0, 1.0, 2.0, 3.0, 3.0, 5.0, 4.0], dtype=torch.float64)  # right, wrong, equal, right
    assert prefers_good(scores, torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])) == pytest.approx((0.5 + 1.0) / 2)


def test_what_cannot_score_says_why(tokenizer, pairs, caplog):
    without_mask = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="[UNK]")
    for model, given, reason in (
        (make_bert(BertModel), tokenizer, "it has no token head"),
        (make_ours(), tokenizer, "pretrained without token prediction and denoising"),
        (make_bert(), without_mask, "its tokenizer has no mask token"),
    ):
        assert reason in why_it_cannot_score(model, given)
        with pytest.raises(ValueError, match=f"cannot score texts: .*{reason}"):
            score_texts(model, given, TEXTS, max_length=16)
        assert probe_tasks(model, given, [pairs], max_length=16) == {}
        assert f"grammar is left out for {type(model).__name__}" in caplog.text and reason in caplog.text
    slots = make_ours(token_prediction_weight=1.0)
    assert why_it_cannot_score(slots, without_mask) is None
    with pytest.raises(ValueError, match="'fox' has 1 tokens"):
        score_texts(slots, tokenizer, ["fox"], max_length=16)


def test_only_balanced_rows_count(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tjepa")
    rows = [
        {"paradigm": "a", "good": f"good {i}", "bad": "bad", "balanced": balanced}
        for i, balanced in enumerate([1, 0, 1])
    ]
    (task,) = load_tasks([f"mine={write_jsonl(tmp_path / 'a.jsonl', rows)}"], None)
    assert task.splits == {"test": {"paradigm": ["a"] * 2, "good": ["good 0", "good 2"], "bad": ["bad"] * 2}}
    assert "mine: 1 of 3 rows are not balanced and do not count" in caplog.text
    (tmp_path / "a.csv").write_text("paradigm,good,bad,balanced\na,x,y,True\na,v,w,False\n")
    (task,) = load_tasks([f"mine={tmp_path}/a.csv"], None)
    assert task.splits["test"]["good"] == ["x"]
    bare = [{"paradigm": "a", "good": "x", "bad": "y"}, {"paradigm": "a", "good": None, "bad": "y"}]
    (task,) = load_tasks([f"mine={write_jsonl(tmp_path / 'b.jsonl', bare)}"], None)  # without it all rows count
    assert task.splits["test"]["good"] == ["x"] and "1 rows of test dropped (paradigm or good or bad" in caplog.text
    with pytest.raises(ValueError, match="no row has a 1 or true in the column balanced"):
        load_tasks([f"mine={write_jsonl(tmp_path / 'c.jsonl', [{**rows[0], 'balanced': 0}])}"], None)


def test_the_command_scores_what_has_a_token_head(tmp_path, tokenizer, pairs, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    made = {
        "pretraining": make_ours(token_prediction_weight=1.0),
        "plain": make_ours(),
        "ours-mlm": make_ours(TJEPAForMaskedLM),
        "encoder": make_ours(TJEPAModel, token_prediction_weight=1.0),
        "bert-mlm": make_bert(),
        "bert": make_bert(BertModel),
    }
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    columns = pairs.splits["test"]
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    arguments = ["--dataset", f"grammar={write_jsonl(tmp_path / 'pairs.jsonl', rows)}"]
    arguments += [
        "--output",
        tmp_path / "out.json",
        "--num_seeds",
        2,
        "--model_name_or_path",
        *(tmp_path / name for name in made),
    ]
    monkeypatch.setattr(sys, "argv", ["run_probing.py", *map(str, arguments)])
    run_probing.main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    for name, model in made.items():
        expected = probe_tasks(model, tokenizer, [pairs], max_length=16)
        assert results[name] == pytest.approx(expected)
        if name in ("pretraining", "ours-mlm", "bert-mlm"):
            assert set(results[f"{name} untrained"]) == {"grammar/accuracy", "grammar/accuracy_std"}
            assert f"{name}: left out grammar" not in caplog.text
        else:
            assert results[f"{name} untrained"] == {} and f"{name}: left out grammar, because" in caplog.text
    assert results["TF-IDF"] == results["bert-mlm embeddings"] == {}


@pytest.mark.parametrize("num_usable", [60, 0])
def test_pairs_of_a_single_token_are_dropped_and_counted(tmp_path, tokenizer, pairs, monkeypatch, caplog, num_usable):
    caplog.set_level(logging.INFO)
    model = make_ours(token_prediction_weight=1.0)  # which adds no special tokens
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    columns = {name: values[:num_usable] for name, values in pairs.splits["test"].items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    rows += [{"paradigm": "a", "good": "fox", "bad": "one fox"}, {"paradigm": "c", "good": "one fox", "bad": "fox"}]
    arguments = ["--dataset", f"grammar={write_jsonl(tmp_path / 'pairs.jsonl', rows)}"]
    arguments += ["--output", tmp_path / "out.json", "--num_seeds", 1, "--model_name_or_path", tmp_path / "ours"]
    monkeypatch.setattr(sys, "argv", ["run_probing.py", *map(str, arguments)])
    run_probing.main()
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    left_out = "" if num_usable else ", which leaves none"
    assert f"grammar: 2 of {len(rows)} pairs dropped{left_out} (a sentence of fewer than two" in caplog.text
    assert results["ours"] == (
        pytest.approx(probe_tasks(model, tokenizer, [pairs], max_length=16)) if rows[2:] else {}
    )
