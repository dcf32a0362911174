"""Whitening as a linear layer, fitted on vectors and on texts, and in the folder for sentence-transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import tjepa
from tjepa.corpus.command_line import check_names
from tjepa.corpus.documents import SourceArguments, record_source
from tjepa.downstream.embedding import embed_texts, load_embedder, read_sentence_modules
from tjepa.downstream.probe import spearman
from tjepa.downstream.whitening import Whitening, as_array, fit_text_whitening, fit_whitening, sentences
from tjepa.tools import export_sentence_transformer


def correlated_vectors(num_texts: int = 400, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(num_texts, width, generator=generator) @ mixing + 3


def test_the_layer_gives_mean_0_and_covariance_1_as_the_probes_whitening_does():
    vectors = correlated_vectors()
    whitened = Whitening.fit(vectors)(vectors)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitened.T.cov(correction=1), torch.eye(8), atol=1e-3, rtol=0)
    np.testing.assert_allclose(whitened, fit_whitening(vectors).transform(as_array(vectors)), atol=1e-3)


def test_fewer_dimensions_are_those_of_largest_variance():
    vectors = correlated_vectors()
    torch.testing.assert_close(Whitening.fit(vectors, 3)(vectors), Whitening.fit(vectors)(vectors)[:, :3])


def test_directions_that_are_not_there_are_said(caplog):
    vectors = correlated_vectors()
    vectors = torch.cat([vectors, vectors.sum(1, keepdim=True)], dim=1)
    assert Whitening.fit(vectors, 8)(vectors).shape == (400, 8) and not caplog.records
    assert Whitening.fit(vectors, 9)(vectors).shape == (400, 8)
    assert "8 dimensions in place of 9" in caplog.text


@pytest.mark.parametrize(
    ("num_texts", "num_dimensions", "message"),
    [(8, None, "8 vectors of texts are too few to whiten 8 dimensions"), (400, 9, "Embeddings have 8 dimensions")],
)
def test_what_cannot_be_fitted_is_said(num_texts, num_dimensions, message):
    with pytest.raises(ValueError, match=message):
        Whitening.fit(correlated_vectors(num_texts), num_dimensions)


def test_of_texts_the_whole_and_one_sentence_are_read(folder):
    encoder = folder / "encoder"
    model, tokenizer = AutoModel.from_pretrained(encoder), AutoTokenizer.from_pretrained(encoder)
    words = "the fox sees a red hen and runs home before night falls".split()
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, 6)) + ".\n" + " ".join(rng.choice(words, 9)) for _ in range(60)]
    whitening = fit_text_whitening(model, tokenizer, [None, " ", *texts], max_length=16)
    pieces = [piece for text in texts for piece in (text, *sentences(text))]
    whitened = whitening(embed_texts(model, tokenizer, pieces, 16))
    # a third of the pieces was not fitted on
    assert whitened.mean(0).abs().max() < 0.5 and 0.5 < whitened.var(0).mean() < 2
    with pytest.raises(ValueError, match="no text to fit a whitening on"):
        fit_text_whitening(model, tokenizer, [None, ""], max_length=16)


def test_sentences_are_lines_too_and_a_short_text_is_its_own():
    assert sentences("Return the sum.\nArgs:\n  axis of the array.") == ["Return the sum.", "axis of the array."]
    assert sentences("a fox") == ["a fox"]


@pytest.mark.parametrize("num_texts", [1, 2, 8, 400])
def test_few_vectors_are_whitened_as_far_as_their_number_tells(num_texts):
    vectors = correlated_vectors(num_texts)
    whitened = Whitening.fit_to_few(vectors)(vectors)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(8), atol=1e-2, rtol=0)
    assert whitened.isfinite().all()
    if num_texts == 400:  # enough: hardly drawn towards a multiple of I
        torch.testing.assert_close(whitened.T.cov(correction=1), torch.eye(8), atol=0.4, rtol=0)
    if num_texts == 8:  # as far apart as they were, nearly: full whitening would make all equally far apart
        assert torch.corrcoef(torch.stack([torch.pdist(whitened), torch.pdist(vectors)]))[0, 1] > 0.3


# --- The exported folder ---------------------------------------------------------------------------------------------


def export(monkeypatch, *arguments) -> None:
    monkeypatch.setattr("sys.argv", ["tjepa export", *map(str, arguments)])
    export_sentence_transformer.main()


def test_sentence_transformers_whitens_as_we_do(folder, tmp_path, monkeypatch):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    train, out = folder / "train.jsonl", tmp_path / "out"
    whitened = ["--whitening_file", train, "--whitening_dimensions", 12]
    export(monkeypatch, folder / "pretraining", out, "--no_normalize", *whitened)
    texts = [json.loads(line)["text"] for line in train.read_text().splitlines()]
    vectors = library.SentenceTransformer(str(out), device="cpu").encode(texts)
    assert vectors.shape == (len(texts), 12)
    assert np.abs(vectors.mean(0)).max() < 0.5 and 0.5 < vectors.var(0).mean() < 2
    np.testing.assert_allclose(vectors, tjepa.embed(out, texts), atol=1e-4)
    raw = tjepa.embed(folder / "pretraining", texts)
    assert np.abs(raw.mean(0) / raw.std(0)).max() > 5  # there was something to whiten


def test_without_a_file_the_run_says_what_it_was_trained_on(folder, tmp_path, monkeypatch):
    run = shutil.copytree(folder / "pretraining", tmp_path / "run")
    with pytest.raises(ValueError, match="does not say which texts it was trained on. Pass --whitening_file"):
        export(monkeypatch, run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.chdir(folder)
    source = record_source(SourceArguments(train_file="train.jsonl", validation_split_percentage=0))
    (run / "all_results.json").write_text(json.dumps({"source": source}))
    (folder / "quickstart").mkdir(exist_ok=True)  # a run may be in a folder of that name
    assert record_source(SourceArguments(dataset_name="quickstart"))["dataset_name"] == "quickstart"
    monkeypatch.chdir(tmp_path)
    export(monkeypatch, run, tmp_path / "out")
    assert len(read_sentence_modules(tmp_path / "out")[1]) == 2  # Dense and Normalize
    shutil.copytree(folder / "tokenizer", run / "checkpoint-2")
    texts = list(export_sentence_transformer.read_whitening_texts(str(run / "checkpoint-2"), None))
    lines = (folder / "train.jsonl").read_text().splitlines()
    assert sorted(texts) == sorted(json.loads(line)["text"] for line in lines)
    (run / "all_results.json").write_text(json.dumps({"source": source | {"train_file": "gone.jsonl"}}))
    with pytest.raises(ValueError, match=r"cannot be read \(.*gone.jsonl.*\). Pass --whitening_file"):
        export(monkeypatch, run, tmp_path / "other")


def test_flags_that_contradict_each_other(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--no_whitening has no use for --whitening_file"):
        export(monkeypatch, folder / "pretraining", tmp_path / "out", "--no_whitening", "--whitening_file=x.txt")
    with pytest.raises(FileNotFoundError, match="--whitening_file: no file 'nowhere.txt'"):
        export(monkeypatch, folder / "pretraining", tmp_path / "out", "--whitening_file", "nowhere.txt")


def test_cosines_say_more_when_whitened(shared_folder, tmp_path, monkeypatch):
    """On STS14, with statistics of novels; and two texts that have nothing to do with each other are not alike."""
    torch.manual_seed(0)
    config = tjepa.TJEPAConfig(
        vocab_size=32000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    model = tjepa.TJEPAModel(config)
    model.final_norm.bias.data.fill_(2.0)  # all vectors point much the same way, as those of trained encoders do
    model.save_pretrained(tmp_path / "encoder")
    tokenizer = AutoTokenizer.from_pretrained(shared_folder / "tokenizers" / "open-llama")
    tokenizer.save_pretrained(tmp_path / "encoder")
    texts = ["--whitening_file", shared_folder / "data" / "books-validation.parquet"]
    export(monkeypatch, tmp_path / "encoder", tmp_path / "raw", "--no_whitening")
    export(monkeypatch, tmp_path / "encoder", tmp_path / "whitened", *texts)
    lines = (shared_folder / "data" / "eval" / "sts14-test.jsonl").read_text().splitlines()[::10]
    pairs = [json.loads(line) for line in lines]
    columns = [[pair[name] for pair in pairs] for name in ("sentence1", "sentence2")]
    correlations, unrelated = [], []
    for name in ("raw", "whitened"):
        embedder = load_embedder(tmp_path / name)
        first, second = map(embedder, columns)
        correlations.append(spearman((first * second).sum(1), [pair["score"] for pair in pairs]))
        one, other = embedder(["Eigenvectors and eigenvalues.", "Opens a file."])
        unrelated.append(float(one @ other))
    assert correlations[1] > correlations[0] + 0.02, correlations
    assert unrelated[1] < unrelated[0] - 0.1, unrelated


def test_the_early_check_of_flags_knows_those_that_begin_with_no():
    check_names(["--no_whitening", "--no_normalize"], ["no_whitening", "no_normalize"])
    with pytest.raises(ValueError, match="no argument --no_whitenin. Did you mean --no_whitening"):
        check_names(["--no_whitenin"], ["no_whitening"])
