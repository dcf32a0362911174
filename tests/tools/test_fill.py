"""Guessing hidden words: what is asked of the predictor, the token head that is fitted afterwards, the commands."""

import shlex
import sys

import encoder_folders
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    pipeline,
)

from helpers import make_texts, make_tiny_config
from tjepa import TJEPAForPreTraining, cli
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy
from tjepa.tools import train_decoder as decoding
from tjepa.tools.fill import guess_tokens, load_for_filling, read_gaps


TEXTS = make_texts(40)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, model_max_length=48)


@pytest.fixture
def save(tokenizer, tmp_path):
    """A folder with a tiny model of these settings and the tokenizer."""

    def save(**overrides):
        torch.manual_seed(0)
        config = make_tiny_config(vocab_size=len(tokenizer), max_position_embeddings=48, **overrides)
        model = TJEPAForPreTraining(config)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tjepa", *map(str, arguments)])
    cli.main()


# ---- the model's own methods ----


@pytest.mark.parametrize("predictor_type", ["self_attention", "cross_attention", "boundary", "in_place"])
def test_predictions_are_those_of_the_same_view_in_a_batch(make_model, predictor_type):
    in_place = predictor_type == "in_place"
    model = make_model(token_prediction_weight=1.0, predictor_type=predictor_type, mask_token_id=59).eval()
    ids = torch.randint(60, (30,), generator=torch.Generator().manual_seed(0))
    example = {"input_ids": ids.numpy(), "document_index": 0, "epoch": 0}
    collator = DataCollatorForTJEPA([MaskingStrategy(3, max_target_mask_ratio=0.4)], seed=1)
    collator.in_place = in_place
    batch = collator([example])
    is_hidden = torch.zeros(30, dtype=torch.bool).index_fill(0, batch["label_indices"].long(), True)
    assert 2 <= (is_hidden.int().diff() == 1).sum()  # several blocks
    with torch.no_grad():
        output = model(**batch)
    expected = output.predictions
    order = batch["label_indices"].argsort()  # the collator's blocks come in the order they were drawn
    changed = ids.clone()
    changed[is_hidden] = 0  # what stands there counts for nothing
    torch.testing.assert_close(model.predict_states(changed, is_hidden), expected[order], atol=1e-5, rtol=1e-4)
    read = output.context_states[batch["hidden_indices"]] if in_place else expected
    logits = model.token_head(read[order], model.get_input_embeddings().weight)
    for mask in (is_hidden, is_hidden.long()):
        torch.testing.assert_close(model.predict_tokens(ids, mask), logits, atol=1e-4, rtol=1e-4)


def test_a_model_in_training_predicts_without_dropout_and_goes_on_training(make_model):
    model = make_model(token_prediction_weight=1.0, denoising_weight=1.0, hidden_dropout_prob=0.5).train()
    ids, is_hidden = torch.arange(20), torch.arange(20) % 5 == 2
    assert torch.equal(model.predict_tokens(ids, is_hidden), model.predict_tokens(ids, is_hidden))
    assert model.training and model.context_encoder.training and not model.target_encoder.training


def test_what_cannot_be_predicted(make_model):
    ids = torch.arange(6)
    with pytest.raises(ValueError, match="no token head. `tjepa train-decoder FOLDER`"):
        make_model().predict_tokens(ids, ids == 2)
    for is_hidden in (ids < 0, ids >= 0):
        with pytest.raises(ValueError, match="a hidden token to predict, and a visible one"):
            make_model().predict_states(ids, is_hidden)


# ---- reading a text ----


def word_piece() -> PreTrainedTokenizerFast:
    return encoder_folders.make_tokenizer()


def prepending() -> PreTrainedTokenizerFast:
    """As Llama 2's: every text gets a space in front, whether it has one or not."""
    words = ["<unk>", "▁", *(f"▁{word}" for word in "the fox sees a hen and runs home".split())]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("which", ["bytes", "words", "prepending", "open-llama"])
def test_gaps_stand_where_the_tokens_of_the_words_would(which, tokenizer, make_model, request):
    if which == "words":
        tokenizer = word_piece()
    elif which == "prepending":
        tokenizer = prepending()
    elif which == "open-llama":
        folder = request.getfixturevalue("shared_folder") / "tokenizers" / "open-llama"
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model = make_model()
    whole = tokenizer("the fox sees a hen and runs home", add_special_tokens=False)["input_ids"]
    start = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    end = len(tokenizer("the fox sees a hen", add_special_tokens=False)["input_ids"])
    num_hidden = end - len(start)
    gapped = read_gaps(f"the fox [{num_hidden}] and runs home", model, tokenizer)
    assert gapped.is_hidden.nonzero().flatten().tolist() == list(range(len(start), end))
    visible = [token for place, token in enumerate(whole) if not len(start) <= place < end]
    assert gapped.input_ids[~gapped.is_hidden].tolist() == visible


def test_two_gaps_and_gaps_at_the_ends(tokenizer, make_model):
    gapped = read_gaps("[2] fox[1]runs [3]", make_model(), tokenizer)
    assert gapped.is_hidden.tolist()[:2] == [True] * 2 and gapped.is_hidden.tolist()[-3:] == [True] * 3
    assert gapped.is_hidden.sum() == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the fox", r"Write \[3\] where three tokens"),
        ("", r"Write \[3\] where"),
        ("the [0] fox", r"Write \[3\] where"),
        ("[3]", "All of the text is hidden"),
        ("the [999999999] fox", "tokens or more, and the model reads 48 at most"),
        ("the fox [1] " * 5000, "tokens or more, and the model reads 48 at most"),
    ],
)
def test_texts_that_cannot_be_filled(text, message, tokenizer, make_model):
    with pytest.raises(ValueError, match=message):
        read_gaps(text, make_model(max_position_embeddings=48), tokenizer)


# ---- the command ----


@pytest.mark.parametrize("text", ["the [3] sees a red hen", "🦊 [2] falls", "الثعلب [1] home"])
def test_the_command_shows_the_text_and_guesses_for_each_hidden_token(text, save, monkeypatch, capsys):
    folder = save(token_prediction_weight=1.0)
    run(monkeypatch, "fill", text, "--model", folder, "--num_results", "2")
    name, filled, *guesses = [line for line in capsys.readouterr().out.split("\n") if line]
    model, tokenizer = load_for_filling(str(folder))
    gapped = read_gaps(text, model, tokenizer)
    expected = guess_tokens(model, tokenizer, gapped, 2)
    assert len(expected) == gapped.is_hidden.sum() and all(len(of_place) == 2 for of_place in expected)
    assert sum(line.count("%") for line in guesses) == 2 * len(expected)
    best = model.predict_tokens(*gapped).softmax(-1).max(-1)
    assert [of_place[0].probability for of_place in expected] == pytest.approx(best.values.tolist())
    gapped.input_ids[gapped.is_hidden] = best.indices
    assert filled == tokenizer.decode(gapped.input_ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("overrides", "arguments", "message"),
    [
        ({}, ["fill", "the [3] fox"], "predicts no tokens. Fit a token head"),
        ({"token_prediction_weight": 1.0}, ["fill", "the fox"], "Write [3] where"),
        ({"token_prediction_weight": 1.0}, ["train-decoder"], "has learned to predict tokens"),
        ({}, ["train-decoder", "--num_steps", "0"], "argument --num_steps: 0; it must be at least 1"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(overrides, arguments, message, save, monkeypatch, capsys):
    folder = save(**overrides)
    where = [folder] if arguments[0] == "train-decoder" else ["--model", folder]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *arguments, *where)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_folder_of_an_encoder_has_no_predictor(save, tmp_path):
    folder = save()
    TJEPAForPreTraining.from_pretrained(folder).target_encoder.save_pretrained(tmp_path / "encoder")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="without its predictor"):
        load_for_filling(str(tmp_path / "encoder"))
    AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(tmp_path / "fine-tuned")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "fine-tuned")
    with pytest.raises(ValueError, match="is a TJEPAForSequenceClassification: it has no predictor. Name the folder"):
        load_for_filling(str(tmp_path / "fine-tuned"))
    bert = encoder_folders.make_folder(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert model"):
        load_for_filling(str(bert))


# ---- a token head fitted afterwards ----


@pytest.mark.parametrize("kind", ["own", "bert"])
def test_a_fitted_head_reads_the_predictions_and_changes_nothing_else(kind, save, tmp_path, monkeypatch, capsys):
    if kind == "own":
        root = folder = save(initializer_range=0.05)
    else:  # the root is the encoder, and what goes on pretraining lies below
        root = encoder_folders.make_folder(tmp_path / "a bert")
        folder = root / "pretraining"
        encoder = AutoTokenizer.from_pretrained(root), encoder_folders.make_encoder("bert")
        model = TJEPAForPreTraining.from_encoder(encoder[1])
        model.save_pretrained(folder)
        encoder[0].save_pretrained(folder)
    # three words in turn: what is hidden follows from what is visible
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(["fox", "hen", "night"] * n) for n in range(4, 14)) + "\n")
    before = load_file(folder / "model.safetensors")
    run(monkeypatch, "train-decoder", root, "--file", tmp_path / "texts.txt", "--num_steps", 10)
    assert capsys.readouterr().out.endswith(f" --model {shlex.quote(str(root))}\n")
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"token_head"}
    run(monkeypatch, "fill", "fox [1] night fox hen night", "--model", root)
    assert "." in capsys.readouterr().out.split("%")[0].split()[-1]  # small probabilities differ, too
    (folder / "checkpoint_complete.json").touch()
    with pytest.raises(SystemExit):
        run(monkeypatch, "train-decoder", folder, "--file", tmp_path / "texts.txt")
    assert "is a checkpoint, and could not be resumed any more: name the run's folder" in capsys.readouterr().err
    model = AutoModelForPreTraining.from_pretrained(folder).train()
    batch = DataCollatorForTJEPA()([{"input_ids": [6, 7, 8, 9] * 5, "document_index": 0, "epoch": 0}])
    model(**batch).loss.backward()  # pretraining goes on as if there were no head
    assert not any(weight.requires_grad for weight in model.token_head.parameters())
    missing = [name for name, weight in model.predictor.named_parameters() if weight.grad is None]
    assert missing == []


def test_the_fitted_head_beats_the_most_frequent_token(make_model):
    """Documents that count up: the hidden token is one more than the one before it."""
    model = make_model(predictor_type="boundary", initializer_range=0.3).eval()
    documents = [[(start + step) % 20 for step in range(16)] for start in range(40)]
    collator = DataCollatorForTJEPA([MaskingStrategy(1, max_target_mask_ratio=0.1)], seed=0)
    figures = decoding.train_decoder(model, documents, collator, num_steps=100, seed=0)
    assert figures.accuracy > 3 * figures.most_frequent and figures.num_places == 4
    with pytest.raises(ValueError, match="there are 1"):
        decoding.train_decoder(model, documents[:1], collator, 1, 0)


def test_the_fill_mask_pipeline_guesses_as_an_in_place_model_does(save, tokenizer):
    """What it is asked is what in-place pretraining asks: the encoders of a new model are equal."""
    settings = {"predictor_type": "in_place", "mask_token_id": tokenizer.mask_token_id}
    folder = save(token_prediction_weight=1.0, **settings)
    answers = pipeline("fill-mask", str(folder))("the<mask> sees a red hen", top_k=3)
    model = TJEPAForPreTraining.from_pretrained(folder)
    ids = tokenizer("the<mask> sees a red hen", return_tensors="pt").input_ids[0]
    best = model.predict_tokens(ids, ids == tokenizer.mask_token_id)[0].softmax(-1).topk(3)
    assert [answer["token"] for answer in answers] == best.indices.tolist()
    assert [answer["score"] for answer in answers] == pytest.approx(best.values.tolist(), rel=1e-3)
    assert all("sees" in answer["sequence"] for answer in answers)


def test_the_fill_mask_pipeline_says_what_masked_language_modelling_taught(save, tokenizer, tmp_path):
    model = AutoModelForMaskedLM.from_pretrained(save(token_prediction_weight=1.0))
    ids = tokenizer("the<mask> sees a red hen", return_tensors="pt").input_ids
    (fox,) = tokenizer(" fox", add_special_tokens=False).input_ids
    labels = torch.where(ids == tokenizer.mask_token_id, fox, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "taught")
    tokenizer.save_pretrained(tmp_path / "taught")
    (answer,) = pipeline("fill-mask", str(tmp_path / "taught"))("the<mask> sees a red hen", top_k=1)
    assert answer["sequence"] == "the fox sees a red hen" and answer["score"] > 0.5
