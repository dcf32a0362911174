"""Loading a tokenizer, its size, what it adds to a text, and that it reads a text as text."""

import copy
import json
import subprocess
import sys

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.bert.tokenization_bert import BertTokenizer

from helpers import make_texts
from tjepa.corpus.documents import DataArguments
from tjepa.corpus.paths import check_exists
from tjepa.corpus.tokenization import StreamTokenizer, tokenize_documents
from tjepa.corpus.tokenizers import load_tokenizer, same_ids, text_reader, vocabulary_size, without_special_tokens
from tjepa.corpus.train_tokenizer import train_tokenizer


TEXTS = ["the fox sees a red hen and runs home < s > / pad [ sep mask ] unk cls"] * 50 + ["<s ab </s"]


def make_bytes() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, vocab_size=400, model_max_length=64)


def make_bert() -> BertTokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = sorted({character for text in TEXTS for character in text if character != " "})
    pieces = [*names, *characters, *(f"##{character}" for character in characters), "the", "fox", "sep", "mask"]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=64)


def make_unigram() -> PreTrainedTokenizerFast:
    """As XLM-R's and T5's: the special tokens are pieces of the model, with the best score of all."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>")
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )  # fmt: skip


def make_words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["[UNK]", "[PAD]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", sep_token="[SEP]", mask_token="[MASK]"
    )


MAKERS = [make_bytes, make_bert, make_unigram, make_words]


@pytest.mark.parametrize("make", MAKERS)
def test_a_literal_special_token_is_read_as_text(make):
    tokenizer = make()
    plain = copy.deepcopy(tokenizer)
    reader = text_reader(tokenizer)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for text in (" ".join(tokenizer.all_special_tokens), f"the {tokenizer.mask_token}fox{tokenizer.pad_token}"):
        assert special & set(tokenizer(text, add_special_tokens=False)["input_ids"]), "the fault would show"
        assert not special & set(reader(text, add_special_tokens=False)["input_ids"])
    for text in ("the fox sees a red hen", "The  HEN runs home "):
        for options in ({}, {"add_special_tokens": False}, {"truncation": True, "max_length": 3}):
            assert reader(text, **options)["input_ids"] == plain(text, **options)["input_ids"]
            assert reader(text, text, **options)["input_ids"] == plain(text, text, **options)["input_ids"]
    assert reader.pad_token_id == tokenizer.pad_token_id and reader.all_special_ids == tokenizer.all_special_ids
    assert tokenizer.mask_token_id in tokenizer(f"the {tokenizer.mask_token}")["input_ids"], (
        "the original is untouched"
    )


def test_a_reader_keeps_the_ids_of_tokens_added_for_a_domain():
    tokenizer = make_bert()
    tokenizer.add_tokens(AddedToken("<entity>", special=True))
    tokenizer.add_tokens(["foxhen"])
    reader = text_reader(tokenizer)
    text = "the foxhen <entity>"
    expected = [*tokenizer.convert_tokens_to_ids(["the", "foxhen", "<"])]
    assert reader(text, add_special_tokens=False)["input_ids"][:3] == expected
    assert reader(["the", "[SEP]"], is_split_into_words=True).word_ids() == [None, 0, 1, 1, 1, None]


def test_shared_tokenizers_read_special_tokens_as_text(shared_folder):
    for name, text in (("open-llama", "a <s> b</s>"), ("bert-base-uncased", "a [SEP] b[MASK]")):
        tokenizer = load_tokenizer(str(shared_folder / "tokenizers" / name))
        reader = text_reader(tokenizer)
        ids = reader(text, add_special_tokens=False)["input_ids"]
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert "".join(reader.decode(ids).split()) == "".join(text.lower().split())
        assert ids == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("make", MAKERS)
def test_without_special_tokens_also_in_a_fresh_process(make, tmp_path):
    tokenizer = make()
    expected = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    without_special_tokens(tokenizer).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("the fox")["input_ids"] == expected and loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("the", "fox")["input_ids"] == loaded("the")["input_ids"] + loaded("fox")["input_ids"]
    assert loaded.mask_token_id in loaded(f"the {loaded.mask_token}")["input_ids"]
    if make is make_bert:  # whose own class adds them again
        assert sorted(loaded("the fox")) == ["attention_mask", "input_ids"]
        code = (
            "import sys; from transformers import AutoTokenizer as A; print(A.from_pretrained(sys.argv[1])('the fox'))"
        )
        process = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
        assert f"'input_ids': {expected}" in process.stdout


def test_documents_are_read_as_text():
    tokenizer = make_unigram()
    documents = Dataset.from_dict({"text": ["the fox </s> sees <mask> a <s> red hen"] * 3})
    special = {tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<mask>")}
    arguments = DataArguments(train_file="-", max_length=64)
    in_memory, _ = tokenize_documents(documents, tokenizer, arguments, "train")
    streamed = StreamTokenizer(tokenizer, arguments)(documents.to_iterable_dataset())
    assert special.isdisjoint(in_memory[0]["input_ids"]) and len(in_memory[0]["input_ids"]) > 10
    assert list(streamed)[0]["input_ids"] == in_memory[0]["input_ids"]


def test_size_is_the_highest_id_plus_one():
    words = {"[UNK]": 0, **{word: index * 10 for index, word in enumerate(make_texts(1)[0].split(), start=1)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    assert vocabulary_size(tokenizer) == max(words.values()) + 1 > len(tokenizer)


def test_same_ids():
    base, larger = make_bert(), make_bert()
    larger.add_tokens(["foxhen"])
    assert same_ids(larger, base) and same_ids(base, larger)
    assert not same_ids(make_bytes(), base) and not same_ids(make_words(), make_unigram())


def test_a_missing_folder_is_named_with_its_neighbour(tmp_path, monkeypatch):
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in (f"{tmp_path}/runs/quickstrat", "./runs/quickstrat", "runs/quickstrat", f"{tmp_path}/run/quickstart"):
        with pytest.raises(FileNotFoundError, match=rf"--tokenizer_name {name}.*runs/quickstart\?"):
            load_tokenizer(name)
    with pytest.raises(FileNotFoundError, match="holds: quickstart"):
        check_exists("runs/something", "--model_name_or_path")
    check_exists("runs/quickstart", "--x"), check_exists("gpt2", "--x"), check_exists("google/bert", "--x")
    for name in ("run/quickstart", "quickstart"):  # may be on the Hub: the hint comes when it is not
        with pytest.raises(ValueError, match="--tokenizer_name" + (".*runs/quickstart" if "/" in name else "")):
            load_tokenizer(name)
    with pytest.raises(ValueError, match="no tokenizer could be loaded.*runs/quickstart holds: nothing"):
        load_tokenizer("runs/quickstart")


@pytest.mark.parametrize("model_type", ["bert", "roberta", "t5", "xlm-roberta"])
def test_a_model_without_files_of_a_tokenizer_is_refused(tmp_path, model_type):
    """transformers makes a tokenizer of special tokens alone, to which every word is unknown."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    for flag, advice in (
        ("--tokenizer_name", "Pass a folder"),
        ("--model_name_or_path", "Save the model's own there"),
    ):
        with pytest.raises(ValueError, match=f"{flag} {tmp_path}: no tokenizer .*files .* are missing.*{advice}"):
            load_tokenizer(str(tmp_path), flag)


def test_code_of_its_own_needs_the_flag(tmp_path):
    make_bert().save_pretrained(tmp_path)
    (tmp_path / "tokenization_own.py").write_text(
        "from transformers.models.bert.tokenization_bert import BertTokenizer\n\n\n"
        "class OwnTokenizer(BertTokenizer):\n    is_own = True\n"
    )
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="pass --trust_remote_code if you trust"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), trust_remote_code=True).is_own
