"""The tokenizer of one's own: lossless, reproducible, and an ordinary tokenizer of transformers."""

import json
import re
import subprocess
import sys
import time

import pytest
from datasets import disable_progress_bars, enable_progress_bars
from transformers import AutoTokenizer

from tjepa.corpus.train_tokenizer import main, train_tokenizer


TEXTS = [f"once upon a time number {number} a little rabbit lived in the forest" for number in range(50)]


def test_loads_with_auto_tokenizer_and_is_lossless(tmp_path):
    trained = train_tokenizer(TEXTS, vocab_size=400, model_max_length=128)
    trained.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.get_vocab() == trained.get_vocab() and tokenizer.model_max_length == 128
    assert len(tokenizer("rabbit lived", add_special_tokens=False)["input_ids"]) < 6
    for text in ("A Little rabbit,  two spaces.\n\tTab", "żółć 日本語 🐇", " do n't clean this up ."):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400, model_max_length=128)
    assert [tokenizer.pad_token, tokenizer.mask_token, tokenizer.bos_token, tokenizer.eos_token] == [
        "<pad>",
        "<mask>",
        "<s>",
        "</s>",
    ]
    assert [tokenizer.pad_token_id, tokenizer.mask_token_id] == [0, 1]
    assert tokenizer("rabbit") == tokenizer("rabbit", add_special_tokens=False)
    assert tokenizer(["rabbit", "a little rabbit"], padding=True)["attention_mask"][0][-1] == 0


def test_a_mask_takes_the_space_before_it(tmp_path):
    """So that what fills the gap, a token that begins with a space, does not stand behind two of them."""
    train_tokenizer(TEXTS, vocab_size=400, model_max_length=128).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a <mask> rabbit")["input_ids"]
    (little,) = tokenizer(" little")["input_ids"]
    filled = [little if token == tokenizer.mask_token_id else token for token in ids]
    assert little in filled and tokenizer.decode(filled) == "a little rabbit"
    assert ids == tokenizer("a<mask> rabbit")["input_ids"]


def test_one_bar_shows_how_far_it_is(capfd):
    """That of the documents, and not those of tokenizers, which a log file would be full of."""
    enable_progress_bars()
    train_tokenizer(TEXTS, vocab_size=300, model_max_length=128)
    shown = capfd.readouterr()
    assert "Training the tokenizer: 100%" in shown.err and "50/50" in shown.err
    assert not re.search("Pre-processing|Count pairs|merges", shown.out + shown.err)
    disable_progress_bars()
    train_tokenizer(TEXTS, vocab_size=300, model_max_length=128)
    shown = capfd.readouterr()
    enable_progress_bars()
    assert shown.out + shown.err == ""


def test_is_deterministic():
    first, second = (train_tokenizer(TEXTS, 400, 128).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_a_word_without_end_is_trained_on_in_pieces():
    start = time.process_time()
    tokenizer = train_tokenizer([*TEXTS, "x" * 300_000], 400, 128)  # in one piece a minute and more
    assert time.process_time() - start < 20
    assert tokenizer.decode(tokenizer("x" * 3000)["input_ids"]) == "x" * 3000
    words = [text for text in TEXTS for _ in range(2)] + ["a" * 900]
    assert '"pattern"' not in train_tokenizer(words, 400, 128).backend_tokenizer.to_str()  # reads as ever


def test_what_is_no_text_is_passed_over():
    mixed = [None, 3, "", "\ud800", *TEXTS]
    assert train_tokenizer(mixed, 400, 128).get_vocab() == train_tokenizer(TEXTS, 400, 128).get_vocab()


def test_errors():
    with pytest.raises(ValueError, match="vocab_size is 100; it must be at least 260"):
        train_tokenizer(TEXTS, vocab_size=100, model_max_length=128)
    with pytest.raises(ValueError, match="tokenizer on: null 2, empty or whitespace only 1. --text_column_name"):
        train_tokenizer([None, " ", None], vocab_size=400, model_max_length=128)
    with pytest.raises(ValueError, match="no text to train the tokenizer on: there are no documents"):
        train_tokenizer([], vocab_size=400, model_max_length=128)


def test_a_file_without_usable_texts_says_why(tmp_path, monkeypatch):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 at night\n" * 3 + b"\n")
    flags = ["--train_file", str(tmp_path / "latin.txt"), "--output_dir", str(tmp_path / "tokenizer")]
    monkeypatch.setattr(sys, "argv", ["tokenizer", *flags, "--validation_split_percentage", "0"])
    with pytest.raises(ValueError, match="invalid unicode 3, empty or whitespace only 1. Files are read as UTF-8"):
        main()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", "", "is a file: name a folder"),
        ("config.json", "{}", "holds a model, which would read its texts by another tokenizer"),
        ("preparation.json", "{}", "holds a prepared dataset, whose token ids are those of the tokenizer"),
        ("special_tokens_map.json", "{}", "files of another tokenizer, .*: special_tokens_map.json. Name another"),
        ("vocab.txt", "a", "files of another tokenizer, .*: vocab.txt. Name another"),
        ("tokenizer.model", "a", "files of another tokenizer, .*: tokenizer.model. Name another"),
    ],
)
def test_folders_that_it_is_not_written_to(tmp_path, monkeypatch, name, content, message):
    folder = tmp_path / "folder"
    if name:
        folder.mkdir()
    (folder / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["tokenizer", "--train_file", "nowhere.txt", "--output_dir", str(folder)])
    with pytest.raises(FileExistsError, match=message):
        main()


def test_a_tokenizer_of_ones_own_is_replaced(tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    flags = ["--train_file", str(tmp_path / "texts.txt"), "--output_dir", str(tmp_path / "tokenizer")]
    for vocab_size in (300, 280):
        monkeypatch.setattr(sys, "argv", ["tokenizer", *flags, "--vocab_size", str(vocab_size)])
        main()
        assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == vocab_size


def test_script(tmp_path):
    lines = [json.dumps({"story": text}) for text in [*TEXTS, None, "  "]]
    (tmp_path / "texts.jsonl").write_text("\n".join([*lines, '{"story": "torn']) + "\n")
    command = [
        sys.executable,
        "-m",
        "tjepa.corpus.train_tokenizer",
        "--train_file",
        "texts.jsonl",
        "--output_dir",
        "tokenizer",
    ]
    command += ["--text_column_name", "story", "--vocab_size", "300", "--streaming", "--max_eval_samples", "5"]
    environment = {"HF_HOME": str(tmp_path / "home"), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert "300 tokens; written to tokenizer" in result.stdout
    assert "3 documents were left out: " in result.stdout
    for reason in ("null 1", "empty or whitespace only 1", "unreadable 1"):
        assert reason in result.stdout
    assert len(AutoTokenizer.from_pretrained(tmp_path / "tokenizer")) == 300
