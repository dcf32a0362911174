"""`tjepa probe --mteb`: a task of one's own, mteb's JSON, and the model-index of the card."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from finetuning_helpers import COLOURS, make_folder
from helpers import write_jsonl
from hub_server import card_errors
from tjepa.downstream import run_probing


TASK = Path(__file__).parents[1] / "data" / "mteb_task.py"
CARD = """---
license: apache-2.0
model-index:
- name: tiny
  results:
  - task: {type: feature-extraction}
    dataset: {type: mine.jsonl, name: mine.jsonl}
    metrics: [{type: eval_loss, value: 0.5}]
---
# tiny
"""


def probe(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["tjepa probe", *map(str, flags)])
    run_probing.main()


def test_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mteb", reason="mteb is not installed")
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path)
    (tmp_path / "pretraining" / "README.md").write_text(CARD)
    (tmp_path / "colours").mkdir()
    rows = [{"text": f"{colour} {colour} {colour}", "label": i} for i, colour in enumerate(COLOURS)] * 10
    for split in ("train", "test"):
        write_jsonl(tmp_path / "colours" / f"{split}.jsonl", rows)
    flags = ("--model_name_or_path", "pretraining", "--mteb", TASK, "--mteb_output", "results-of-mteb")
    probe(monkeypatch, *flags)
    probe(monkeypatch, *flags)  # a second time replaces the figures of the first
    said = capsys.readouterr().out
    (path,) = (tmp_path / "results-of-mteb").rglob("Colours.json")
    assert "local__pretraining" in path.parts
    content = json.loads(path.read_text())
    (scores,) = content["scores"]["test"]
    assert content["task_name"] == "Colours" and scores["main_score"] == scores["accuracy"]
    assert scores["accuracy"] == 1.0, "each class is one text"
    line = next(line for line in said.splitlines() if line.startswith("Colours accuracy"))
    assert line.split()[-1] == f"{100 * scores['accuracy']:.1f}"

    card = ModelCard.load(tmp_path / "pretraining" / "README.md")
    assert card_errors(card.content) == [] and str(tmp_path) not in card.content
    figures = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert figures == {"mine.jsonl": 0.5, "MTEB Colours (default)": scores["accuracy"]}
    assert len(card.data.eval_results) == 2

    shutil.copytree("pretraining", "other/pretraining")  # two of one name keep their figures apart
    probe(monkeypatch, "--model_name_or_path", "pretraining", "other/pretraining", *flags[2:])
    assert {path.parts[-3] for path in (tmp_path / "results-of-mteb").rglob("Colours.json")} == {
        "local__pretraining",
        "local__other-pretraining",
    }
    for split in ("train", "test"):
        write_jsonl(tmp_path / "colours" / f"{split}.jsonl", [{**row, "label": str(row["label"] % 2)} for row in rows])
    with pytest.raises(
        ValueError, match=r"--mteb could not judge pretraining by \['Colours'\]: ValueError: pos_label=1"
    ):
        probe(monkeypatch, *flags)


@pytest.mark.parametrize(
    "flags, error",
    [
        (("--mteb", "STSBenchmarkk"), "Did you mean: 'STSBenchmark'"),
        (("--mteb", "none.py"), "there is no such file"),
        (("--mteb", "empty.py"), "defines no task"),
        (("--mteb", "broken.py"), "--mteb broken.py cannot be run: SyntaxError"),
        (("--mteb", "empty.py", "--mteb_output", "empty.py"), "--mteb_output empty.py: .* is a file"),
        (("--mteb", "x", "--encoder", "context"), "leave out --encoder"),
    ],
)
def test_refused_before_the_work(tmp_path, monkeypatch, flags, error):
    pytest.importorskip("mteb", reason="mteb is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.py").write_text("from mteb.abstasks import AbsTaskClassification\n")
    (tmp_path / "broken.py").write_text("x = (\n")
    monkeypatch.setattr(run_probing, "load_config", lambda *args, **kwargs: None)
    with pytest.raises((ValueError, FileNotFoundError, FileExistsError), match=error):
        probe(monkeypatch, "--model_name_or_path", "pretraining", *flags)


def test_without_mteb(monkeypatch):
    monkeypatch.setattr(run_probing, "load_config", lambda *args, **kwargs: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"tjepa\[mteb\]"):
        probe(monkeypatch, "--model_name_or_path", "x", "--mteb", "STSBenchmark")
