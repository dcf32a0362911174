"""`--probe_file`: the frozen probe at every evaluation, in log, card and report, without a trace in training."""

import json

from transformers import AutoModel, AutoTokenizer

from helpers import arguments, make_texts, run
from tjepa.downstream.before_after import BeforeAfter


def test_the_encoder_is_judged_at_every_evaluation(inputs, tmp_path, monkeypatch, capsys, with_reports):
    rows = [
        {"text": f"{('fox', 'hen')[i % 2]} {text}", "label": i % 2} for i, text in enumerate(make_texts(60, seed=1))
    ]
    labelled = tmp_path / "labelled.jsonl"
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"eval_strategy": "steps", "eval_steps": 2, "disable_tqdm": True}
    run(monkeypatch, arguments(inputs, tmp_path / "judged", probe_file=labelled, **settings))
    lines = [json.loads(line) for line in (tmp_path / "judged" / "log.jsonl").read_text().splitlines()]
    judged = {line["step"]: line["eval_probe_accuracy"] for line in lines if "eval_loss" in line}
    assert judged.keys() == {2, 4}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "judged")
    comparison = BeforeAfter([], str(labelled))
    for step, accuracy in judged.items():
        encoder = AutoModel.from_pretrained(tmp_path / "judged" / f"checkpoint-{step}")
        assert comparison.probe_now(encoder, tokenizer, 64) == accuracy
    assert f"probe {judged[2]:.1%}" in capsys.readouterr().out

    results = json.loads((tmp_path / "judged" / "all_results.json").read_text())
    assert results["eval_probe_accuracy"] == judged[4] == results["before_after"]["probe_after"]
    card = (tmp_path / "judged" / "README.md").read_text()
    assert f"| eval_probe_accuracy | {judged[4]:.4f} |" in card and "type: eval_probe_accuracy" in card
    page = (tmp_path / "judged" / "report.html").read_text()
    assert "Accuracy of the probe for your labels" in page and "before training" in page
    facts = json.loads((tmp_path / "judged" / "run.json").read_text())
    assert facts["probe_at_start"] == results["before_after"]["probe_before"]

    run(monkeypatch, arguments(inputs, tmp_path / "plain", **settings))
    plain = [json.loads(line) for line in (tmp_path / "plain" / "log.jsonl").read_text().splitlines()]
    losses = [[line["loss"] for line in log if "loss" in line] for log in (lines, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
