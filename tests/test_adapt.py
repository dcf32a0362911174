"""`tjepa adapt`: any encoder in, the same class out, and what it did to it; on tiny random encoders."""

import json
import sys

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast, GPT2Config, GPT2Model

from helpers import WORDS, make_texts
from tjepa import cli, run_pretraining
from tjepa.corpus.arguments import parse_arguments
from tjepa.corpus.command_line import CONFIGS
from tjepa.corpus.documents import DataArguments
from tjepa.training.arguments import TRAINED_ENCODER_MOVES
from tjepa.training.ema import EMACallback


SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts, labelled texts, and encoders: a BERT, one of sentence-transformers, one that only looks back."""
    folder = tmp_path_factory.mktemp("adapt")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *WORDS]))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=130, initializer_range=0.5))
    gpt2 = GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=130))
    for name, model in (("bert", bert), ("sentence", bert), ("gpt2", gpt2)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "sentence" / "modules.json").write_text(json.dumps(modules))
    (folder / "sentence" / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True}
    (folder / "sentence" / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "texts.txt").write_text("\n".join(make_texts(250)))
    rows = [{"text": text, "label": index % 2} for index, text in enumerate(make_texts(40, seed=1))]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def adapt(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["tjepa", "adapt", *map(str, arguments)])
    cli.main()


def adapt_texts(monkeypatch, folder, encoder, output_dir, *more) -> None:
    flags = ["--train_file", folder / "texts.txt", "--output_dir", output_dir, "--cache_dir", folder / "cache"]
    adapt(monkeypatch, encoder, *flags, "--disable_tqdm", "true", "--max_steps", 12, *more)


def test_from_an_encoder_to_one_of_the_same_class(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    more = ["--probe_file", folder / "labelled.jsonl", "--learning_rate", "1e-2"]
    adapt_texts(monkeypatch, folder, folder / "sentence", out, *more)
    lines = capsys.readouterr().out.split("What it did to the encoder\n")[1].split("\n\n")[0].strip().splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [
        "Retrieval of a text's second half by its first",
        "Probe for the labels",
        "Similarity",
    ]
    results = json.loads((out / "all_results.json").read_text())
    assert [line.strip() for line in lines] == results["before_after"]["lines"]
    assert results["before_after"]["neighbours_kept"] < 1.0, "the encoder has changed"
    assert "25 held-out texts" in lines[0] and "20 texts" in lines[1]
    card = (out / "README.md").read_text()
    assert all(line in card for line in results["before_after"]["lines"])

    before, after = AutoModel.from_pretrained(folder / "sentence"), AutoModel.from_pretrained(out)
    assert type(after) is BertModel and after.config.vocab_size == 20
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(folder / "bert").get_vocab()
    assert (out / "modules.json").is_file() and (out / "1_Pooling" / "config.json").is_file()

    # and once more, from what came out: its root, and with the predictor
    for name, source in (("again", out), ("on", out / "pretraining")):
        adapt_texts(monkeypatch, folder, source, tmp_path / name)
        assert type(AutoModel.from_pretrained(tmp_path / name)) is BertModel
        assert (tmp_path / name / "modules.json").is_file()
        assert len(json.loads((tmp_path / name / "all_results.json").read_text())["before_after"]["lines"]) == 3


def test_what_is_compared_is_the_encoder_before_and_what_is_exported(folder, tmp_path, monkeypatch):
    compared = []

    class Comparison:
        def __init__(self, *args):
            pass

        def embed(self, encoder, tokenizer, max_length):
            compared.append({name: weight.clone() for name, weight in encoder.state_dict().items()})

        def report(self, before, after):
            return {"lines": []}

    monkeypatch.setattr(run_pretraining, "BeforeAfter", Comparison)
    adapt_texts(monkeypatch, folder, folder / "bert", tmp_path, "--ema_momentum", 1)
    for weights, source in zip(compared, (folder / "bert", tmp_path), strict=True):
        stored = AutoModel.from_pretrained(source).state_dict()
        assert all(torch.equal(weights[name], stored[name]) for name in stored)


def test_a_few_texts_are_trained_on_and_not_judged(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "few.txt").write_text("\n".join(make_texts(40)))
    flags = ["--train_file", tmp_path / "few.txt", "--output_dir", tmp_path / "out", "--cache_dir", folder / "cache"]
    adapt(monkeypatch, folder / "bert", *flags, "--num_train_epochs", 1, "--disable_tqdm", "true")
    assert "4 held-out texts of 40 characters or more tell nothing; 20 would." in capsys.readouterr().out
    assert AutoModel.from_pretrained(tmp_path / "out") is not None


def test_without_a_mask_token_it_works_and_says_so(folder, tmp_path, monkeypatch, caplog):
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.mask_token = None
    AutoModel.from_pretrained(folder / "bert").save_pretrained(tmp_path / "in")
    tokenizer.save_pretrained(tmp_path / "in")
    adapt_texts(monkeypatch, folder, tmp_path / "in", tmp_path / "out", "--max_steps", 1)
    assert "The tokenizer has no mask token: [UNK] stands in hidden places" in caplog.text


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Which encoder?"),
        (["--train_file", "my.txt"], "Which encoder?"),
        (["reference.yaml"], "Which encoder?"),
        (["bert", "my.txt"], "Texts are --train_file my.txt."),
        (["bert"], "Pass either --dataset_name"),
        (["nowhere/at/all", "--train_file", "texts.txt"], "nowhere/at/all"),
        (["gpt2", "--train_file", "texts.txt"], "GPT2Model does not look ahead"),
        (["bert", "--train_file", "texts.txt", "--max_length", "129"], "pass --max_length 128"),
        (["bert", "--train_file", "texts.txt", "--validation_split_percentage", "0"], "judges on held-out texts"),
        (["bert", "--train_file", "texts.txt", "--probe_file", "none.jsonl"], "--probe_file none.jsonl"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        adapt(monkeypatch, *arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith("tjepa adapt: error: ") and message in error


@pytest.mark.parametrize("num_steps", [20, 1000])
def test_a_third_of_the_encoder_stays_as_it_was_in_a_run_of_any_length(num_steps):
    momentum = EMACallback(1.0 - TRAINED_ENCODER_MOVES / num_steps, 1.0)
    assert momentum.share_of_start(num_steps) == pytest.approx(1 / 3, abs=0.05)


# ---- the command line ----


@pytest.fixture
def seen(monkeypatch):
    seen = []
    monkeypatch.setattr(run_pretraining, "main", lambda: seen.append(sys.argv))
    return seen


def test_it_is_pretraining_with_a_recipe_over_which_flags_win(seen, monkeypatch):
    adapt(monkeypatch, "bert", "reference.yaml", "--train_file", "my.txt")
    assert seen == [
        [
            "tjepa adapt",
            "configs/adapt.yaml",
            "reference.yaml",
            "--model_name_or_path",
            "bert",
            "--train_file",
            "my.txt",
        ]
    ]


def test_of_two_files_the_later_one_wins_and_overrides_add_up(tmp_path):
    (tmp_path / "a.yaml").write_text("max_length: 8\nmin_tokens: 3\nvalidation_file: v.txt\nstreaming: true\n")
    (tmp_path / "b.yaml").write_text("max_length: 9\nvalidation_file: null\n")
    (args,) = parse_arguments(DataArguments, [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "--min_tokens=4"])
    assert (args.max_length, args.min_tokens, args.validation_file, args.streaming) == (9, 4, None, True)
    (tmp_path / "a.yaml").write_text("config_overrides: a=1\n")
    (tmp_path / "b.yaml").write_text("config_overrides: b=2\n")
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    (args,) = parse_arguments(run_pretraining.ModelArguments, [*files, "--config_overrides=c=3"])
    assert args.config_overrides == "a=1,b=2,c=3"


@pytest.mark.parametrize("arguments", [["--help"], ["bert", "-h"]])
def test_the_help_is_short_and_true(arguments, monkeypatch, capsys):
    adapt(monkeypatch, *arguments)
    text = capsys.readouterr().out
    assert text.startswith("usage: tjepa adapt ENCODER ") and len(text.splitlines()) < 25
    assert max(map(len, text.splitlines())) <= 120
    recipe = (CONFIGS / "adapt.yaml").read_text()
    assert "\nmax_length: 128\n" in recipe and "\nnum_train_epochs: 3\n" in recipe and "runs/adapted" in recipe
    assert "\nlearning_rate: 1.0e-4\n" in recipe and "Default: 1e-4" in text
