"""benchmarks/adaptation.py on a tiny random encoder and generated words: it runs, and goes on where it was stopped."""

import importlib.util
import json
import sys
from pathlib import Path

import datasets
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from helpers import WORDS, make_texts


SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "adaptation.py"


@pytest.fixture
def adaptation(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("adaptation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    columns = {"text": [text.replace(" ", "\n", 1) for text in make_texts(60)], "label": [0, 1] * 30}
    documents = datasets.Dataset.from_dict(columns)
    splits = datasets.DatasetDict(train=documents, validation=documents.select(range(20)))
    monkeypatch.setattr(module, "load_quickstart_documents", lambda: splits)
    return module


def test_it_trains_judges_and_goes_on(adaptation, tmp_path, monkeypatch, capsys):
    encoder, out = tmp_path / "bert", tmp_path / "out"
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(encoder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=20, max_position_embeddings=80, **sizes)).save_pretrained(encoder)
    pairs = [{"sentence1": word, "sentence2": WORDS[i - 1], "score": i % 5} for i, word in enumerate(WORDS)]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    options = ["--encoder", encoder, "--output_dir", out, "--sts_file", tmp_path / "sts.jsonl", "--seconds", "0.2"]
    options += ["--num_probe_texts", "40", "--recipe", "fast=--learning_rate 1e-2 --warmup_steps 0", "--seeds", "0"]

    def run(*more) -> dict:
        monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, options), *more])
        adaptation.main()
        return json.loads((out / "result.json").read_text())["results"]

    monkeypatch.setattr(sys.modules["rivals"], "LEARNING_RATE", 0.1)
    names = ["fast", "mlm", "simcse", "halves", "tsdae"]
    results = run("--only", *names)
    assert list(results) == ["untouched", *names]
    untouched, fast, *others = (runs[0] for runs in results.values())
    assert len({run["retrieval"] for run in others}) == len(others), "two of them do the same"
    assert fast["steps"] >= 1 and fast["seconds"] > 0.0
    assert set(fast) - {"steps", "seconds"} == set(untouched) == {*adaptation.MEASURES, "retrieval_error"}
    assert fast["retrieval"] != untouched["retrieval"]
    assert (
        capsys.readouterr()
        .out.splitlines()[-len(names)]
        .startswith(f"| fast | {fast['steps']} | {fast['retrieval']:.3f} |")
    )
    assert not [path for path in out.iterdir() if path.is_dir()], "weights are not kept"

    monkeypatch.setattr(adaptation, "adapt", lambda *args: pytest.fail("it was run again"))
    monkeypatch.setattr(adaptation, "train_rival", adaptation.adapt)
    assert run("--only", *names) == results
    with pytest.raises(ValueError, match="untouched.json was made with other settings"):
        run("--judge_on", "test")
    with pytest.raises(SystemExit, match=r"there is no recipe \['slow'\]"):
        run("--only", "slow")

    texts = []
    for part in ("validation", "test"):
        monkeypatch.setattr(sys, "argv", ["adaptation.py", *map(str, options), "--judge_on", part])
        judge = adaptation.Judge(adaptation.parse_arguments())
        texts.append(set(judge.test["text"]))
    assert all(texts) and not texts[0] & texts[1], "what recipes are chosen by is not reported on"
