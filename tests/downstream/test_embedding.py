"""`tjepa.embed` and what it is made of: packed rows give what padded ones give."""

import json

import pytest
import torch
from encoder_folders import make_folder as make_stock_folder
from encoder_folders import make_tokenizer
from tokenizers import normalizers
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification, AutoTokenizer

import tjepa
from encoder_families import make_encoder
from helpers import make_tiny_config
from tjepa import TJEPAModel
from tjepa.downstream import embedding
from tjepa.downstream.embedding import embed_texts, embed_tokens, takes_packed_rows


def make_ids(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 60, (length,), generator=generator).tolist() for length in lengths]


def make_model(name: str):
    torch.manual_seed(0)
    return TJEPAModel(make_tiny_config()) if name == "ours" else make_encoder(name)


@pytest.mark.parametrize(
    ("name", "is_packed"),
    [("ours", True), ("bert", True), ("roberta", True), ("modernbert", True), ("mpnet", False), ("gpt2", False)],
)
def test_packed_is_padded(name, is_packed, monkeypatch):
    model = make_model(name).train()
    attention = model.config._attn_implementation
    ids = make_ids([7, 1, 60, 7, 33, 2, 60, 19])  # beyond ModernBERT's window of 8 to either side
    ways = []
    for way in ("packed_states", "padded_states"):
        run = getattr(embedding, way)
        monkeypatch.setattr(embedding, way, lambda *args, run=run, way=way: ways.append(way) or run(*args))
    embedded = embed_tokens(model, ids, batch_size=5)
    assert ways == ["packed_states" if is_packed else "padded_states"] * 2
    assert model.training and model.config._attn_implementation == attention
    monkeypatch.setattr(embedding, "takes_packed_rows", lambda model: False)
    torch.testing.assert_close(embedded, embed_tokens(model, ids, batch_size=5), atol=1e-5, rtol=1e-5)
    for row, vector in zip(ids, embedded, strict=True):  # each text alone, without either
        with torch.no_grad():
            alone = model.eval()(input_ids=torch.tensor([row])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, alone, atol=1e-5, rtol=1e-5)


def test_what_reads_texts_is_made_once(tmp_path, monkeypatch):
    folder = make_stock_folder(tmp_path / "bert")
    made = []
    make = embedding.text_reader
    monkeypatch.setattr(embedding, "text_reader", lambda tokenizer: made.append(1) or make(tokenizer))
    embed = embedding.load_embedder(folder)
    first = embed(["some text"])
    assert torch.equal(embed(["some text"]), first) and len(made) == 1
    embed.tokenizer.add_tokens(["some text"])
    assert len(embed.tokenize(["some text"])[0]) == 3 and len(made) == 2


@pytest.mark.parametrize("name", ["ours", "bert"])
def test_packed_in_bfloat16(name):
    """Held to float32 by direction: 8 bits of a mantissa are 0.4% of every feature."""
    model, ids = make_model(name), make_ids([7, 30, 12, 3])
    expected = embed_tokens(model, ids)
    assert takes_packed_rows(model.to(torch.bfloat16))
    embedded = embed_tokens(model, ids)
    assert embedded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(embedded, expected).min() > 0.999


def test_eager_attention_is_not_packed_because_its_mask_would_be_a_square(folder):
    assert takes_packed_rows(AutoModel.from_pretrained(folder / "encoder"))
    assert not takes_packed_rows(AutoModel.from_pretrained(folder / "encoder", attn_implementation="eager"))


# --- Folders ---------------------------------------------------------------------------------------------------------


TEXTS = ["the fox sees a red hen", "a hen", "and runs home before night falls the fox sees", "night"]


def test_embed_takes_folders_and_models(folder):
    encoder = AutoModel.from_pretrained(folder / "pretraining")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    expected = embed_texts(encoder, tokenizer, TEXTS, max_length=32)
    torch.testing.assert_close(tjepa.embed(str(folder / "pretraining"), TEXTS), expected)
    torch.testing.assert_close(tjepa.embed(encoder, TEXTS), expected)  # its tokenizer lies where it came from
    torch.testing.assert_close(tjepa.embed(encoder, TEXTS, tokenizer, batch_size=1), expected)
    for auto_class in (AutoModelForPreTraining, AutoModelForSequenceClassification):
        whole = auto_class.from_pretrained(folder / "pretraining")
        torch.testing.assert_close(tjepa.embed(whole.eval(), TEXTS), expected)
    weight = torch.ones(expected.shape[1], requires_grad=True)
    (tjepa.embed(encoder, TEXTS) @ weight).sum().backward()  # they may be learned from
    torch.testing.assert_close(weight.grad, expected.sum(0))
    cut = tjepa.embed(folder / "pretraining", TEXTS, max_length=2)
    torch.testing.assert_close(cut, embed_texts(encoder, tokenizer, TEXTS, max_length=2))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embed_is_what_sentence_transformers_encodes(tmp_path, pooling):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    from sentence_transformers.sentence_transformer import modules

    stock = make_stock_folder(tmp_path / "stock")
    torch.manual_seed(0)
    dense = library.base.modules.Dense(32, 6, activation_function=torch.nn.Identity())
    parts = [library.base.modules.Transformer(str(stock)), modules.Pooling(32, pooling), dense]
    model = library.SentenceTransformer(modules=[*parts, modules.Normalize()], device="cpu")
    model.save(str(tmp_path / "saved"))
    torch.testing.assert_close(tjepa.embed(tmp_path / "saved", TEXTS), torch.tensor(model.encode(TEXTS)))


def test_long_texts_are_cut_to_the_positions_that_tokens_may_have(tmp_path):
    """RoBERTa has 160, and counts from its padding id + 1, which is 2."""
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 512
    for saved in (make_encoder("roberta"), tokenizer):
        saved.save_pretrained(tmp_path)
    vectors = tjepa.embed(tmp_path, [" ".join(["fox"] * number) for number in (156, 157, 999)])
    assert torch.equal(vectors[1], vectors[2])
    torch.testing.assert_close(vectors[0], vectors[1], atol=1e-5, rtol=1e-5)


def test_what_cannot_be_embedded_is_said(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        tjepa.embed(folder / "nowhere", TEXTS)
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        AutoModel.from_pretrained(folder / "encoder").save_pretrained(tmp_path / "bare")
        tjepa.embed(tmp_path / "bare", TEXTS)
    with pytest.raises(ValueError, match="takes a list of texts, got one string"):
        tjepa.embed(folder / "encoder", "a fox")
    with pytest.raises(ValueError, match="Text 1 of 2 has no tokens"):
        tjepa.embed(folder / "encoder", (text for text in ["a fox", ""]))
    for text, fault in ((None, "null: None"), (0.5, "not a string: 0.5"), ("a\ud800", "invalid unicode: 'a")):
        with pytest.raises(ValueError, match=f"Text 1 of 2 is {fault}"):
            tjepa.embed(folder / "encoder", ["a fox", text])
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        tjepa.embed(folder / "encoder", TEXTS, max_length=0)
    with pytest.raises(ValueError, match="of no folder that could hold its tokenizer"):
        tjepa.embed(make_model("ours"), TEXTS)
    with pytest.raises(ValueError, match="a folder, a name on the Hub or a model of transformers, got a .*Linear"):
        tjepa.embed(torch.nn.Linear(2, 2), TEXTS)
    stock = make_stock_folder(tmp_path / "stock")
    (stock / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": true}')
    with pytest.raises(ValueError, match="has do_lower_case in sentence_bert_config.json, which is not computed"):
        tjepa.embed(stock, TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(stock)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(stock)  # which sentence-transformers leaves as it is
    assert torch.equal(tjepa.embed(stock, ["A Fox"]), tjepa.embed(stock, ["a fox"]))
    prompts = {"prompts": {"query": "query: ", "other": ""}, "default_prompt_name": "other"}
    (stock / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    tjepa.embed(stock, TEXTS)
    (stock / "config_sentence_transformers.json").write_text(json.dumps({**prompts, "default_prompt_name": "query"}))
    with pytest.raises(ValueError, match="has the default prompt 'query: ', which is not computed here"):
        tjepa.embed(stock, TEXTS)
    pooling = json.loads((stock / "1_Pooling" / "config.json").read_text())
    pooling |= {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}
    (stock / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ValueError, match=r"has the pooling max_tokens, which is not computed here: use Sentence"):
        tjepa.embed(stock, TEXTS)
