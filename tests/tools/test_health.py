"""`tjepa health`: what it says of every way in which a run can go wrong, and where to read on."""

import json
import math
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from helpers import REPOSITORY
from tjepa import cli
from tjepa.tools import health, report
from tjepa.tools.health import diagnose, worst_level
from tjepa.tools.pictures import REFERENCE_FILE, load_reference
from tjepa.training.record import Run


GOOD = {"target_std": 0.9, "cosine": 0.5, "mean_target_cosine": 0.4, "target_rank": 0.5}
COUNTS = {"num_documents": 100, "num_kept": 99, "dropped": {"null": 1}, "num_tokens": 900, "num_tokens_cut": 9}


def make_run(tmp_path, last=None, results=None, **facts) -> Run:
    """A healthy run of 100 steps; `last` changes the last line of its log."""
    log = [
        {"step": step, "loss": 10 - step / 20, "ema_momentum": 0.9, "epoch": 1.0, **GOOD}
        for step in range(10, 101, 10)
    ]
    log[-1] = {**log[-1], **(last or {})}
    results = {"probe_accuracy": 0.7, "probe_accuracy_untrained": 0.6} if results is None else results
    return Run(tmp_path, log, results, **{"max_steps": 100, "documents": {"train": COUNTS}, **facts})


@pytest.mark.parametrize(
    ("settings", "next_command"),
    [
        ({}, 'tjepa search "eigenvalues of a matrix" --model {}'),
        (
            {"train_file": "my texts/*.csv", "text_column_name": "body"},
            "tjepa search \"some words\" --model {} --file 'my texts/*.csv' --text_column_name body",
        ),
    ],
)
def test_what_to_type_next(tmp_path, monkeypatch, settings, next_command):
    """What is searched is what was trained on; whatever is in a path, the line can be copied."""
    folder, default = tmp_path / "a run", 'tjepa search "eigenvalues of a matrix" --model {}'
    for num_documents, expected in ((100, next_command), (10**7, default)):  # so many would take hours
        counts = {"train": {**COUNTS, "num_documents": num_documents}}
        run = make_run(tmp_path, settings=settings, documents=counts)
        monkeypatch.setattr(health, "read_run", lambda _, run=run: run)
        assert health.closing_lines(str(folder))[-1] == f"Next    {expected.format(shlex.quote(str(folder)))}"


def findings_of(run: Run) -> dict[str, health.Finding]:
    return {finding.name: finding for finding in diagnose(run)}


def test_a_healthy_run(tmp_path):
    findings = diagnose(make_run(tmp_path))
    assert {finding.level for finding in findings} == {"good"} and health.summarise(findings) == "Healthy."
    assert not any(finding.advice for finding in findings)


@pytest.mark.parametrize(
    ("name", "level", "change", "advice"),
    [
        ("spread of the targets", "bad", {"last": {"target_std": 0.05}}, "variance_covariance_weight"),
        ("predictions", "bad", {"last": {"cosine": 0.39}}, "token_prediction_weight"),
        ("predictions", "watch", {"last": {"cosine": 0.41}}, "Wait"),
        ("predictions", "watch", {"last": {"cosine": 0.39}, "max_steps": 1000}, "Wait"),
        ("directions in use", "watch", {"last": {"target_rank": 0.05}}, "tjepa probe"),
        ("numbers", "bad", {"last": {"loss": math.nan}}, "--resume_from_checkpoint|Resume"),
        ("numbers", "watch", {"last": {"nonfinite_gradients": 3}}, "--bf16"),
        ("loss", "watch", {"last": {"loss": 50.0}}, "cosine"),
        ("target encoder", "watch", {"last": {"ema_momentum": 0.9}}, "ema_momentum"),
        ("documents", "watch", {"documents": {"train": {**COUNTS, "dropped": {"null": 50}}}}, "report"),
        ("documents", "watch", {"documents": {"train": {**COUNTS, "num_tokens_cut": 900}}}, "split"),
        ("passes over the text", "watch", {"last": {"epoch": 50.0}}, "More text"),
        ("what was learned", "bad", {"results": {"probe_accuracy": 0.5, "probe_accuracy_untrained": 0.6}}, "longer"),
        ("what was learned", "watch", {"results": {"eval_loss": 1.0}}, "tjepa probe"),
        ("what was learned", "watch", {"results": {"before_after": {"lines": ["R: worse. 0.1"]}}}, "rate"),
        ("end", "watch", {"results": {}, "max_steps": 200}, "save_steps"),
    ],
)
def test_each_way_to_go_wrong(tmp_path, name, level, change, advice):
    run = make_run(tmp_path, **change)
    if name == "target encoder":
        for line in run.log:
            line["ema_momentum"] = 0.999
    if change.get("max_steps") == 1000:  # early, and it rises
        run.log[-2]["cosine"] = 0.3
    finding = findings_of(run)[name]
    assert finding.level == level and any(words in finding.advice for words in advice.split("|")), finding
    others = {other: f.level for other, f in findings_of(run).items() if other != name}
    assert set(others.values()) <= {"good"} or change.get("results") == {} or change.get("max_steps"), others


def test_no_advice_names_what_the_run_has(tmp_path):
    terms = {"token_prediction_loss": 5.0, "variance_covariance_loss": 1.0}
    counts = {"train": {**COUNTS, "num_tokens_cut": 900}}
    settings = {"masking_strategies": "short_blocks", "long_documents": "split"}
    for last in ({"target_std": 0.05}, {"cosine": 0.39}):
        plain = findings_of(make_run(tmp_path, last=last, documents=counts))
        run = make_run(tmp_path, last={**last, **terms}, documents=counts, settings=settings)
        for name, finding in findings_of(run).items():
            for words in ("--config_overrides", "short_blocks", "--long_documents"):
                assert words not in finding.advice, finding
            if finding.advice != plain[name].advice:
                assert finding.level == plain[name].level != "good" and finding.advice
    half = findings_of(make_run(tmp_path, last={"target_std": 0.05, "token_prediction_loss": 5.0}))
    assert "Add variance_covariance_weight=0.5 to --config_overrides" in half["spread of the targets"].advice


def test_evaluations_count_more_than_training(tmp_path):
    run = make_run(tmp_path)
    run.log.append({"step": 100, "eval_loss": 1.0, **{f"eval_{name}": value for name, value in GOOD.items()}})
    run.log[-1]["eval_target_std"] = 0.01
    assert "on held-out texts, step 100" in findings_of(run)["spread of the targets"].figures
    assert worst_level(diagnose(run)) == "bad"


def test_a_run_that_has_logged_nothing(tmp_path):
    run = Run(tmp_path, [], {}, max_steps=100)
    assert findings_of(run)["figures"].level == "watch" and worst_level(diagnose(run)) == "watch"
    assert "Wait" in findings_of(run)["figures"].advice
    ended = Run(tmp_path, [], {"train_steps": 100}, max_steps=100)
    assert "Wait" not in findings_of(ended)["figures"].advice


def test_the_command(tmp_path, monkeypatch, capsys):
    """Of a run's folder as it lies there; the exit code tells a script."""
    run = make_run(tmp_path)
    for last, code in (({}, 0), ({"target_std": 0.01}, health.NOT_HEALTHY)):
        run.log[-1].update(last)
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in run.log) + '{"half of a li')
        (tmp_path / "run.json").write_text(json.dumps({"max_steps": 100, "unknown": 1}))
        monkeypatch.setattr(sys, "argv", ["tjepa", "health", str(tmp_path)])
        if code:
            with pytest.raises(SystemExit) as end:
                cli.main()
            assert end.value.code == code
        else:
            cli.main()
        text = capsys.readouterr().out
        of_run = [line for line in text.splitlines() if str(tmp_path) not in line]
        assert max(map(len, of_run)) <= 120 and ("BAD" in text) == bool(code)
        assert text.startswith(f"{tmp_path}: ") and text.split(": ", 1)[1].startswith(health.summarise_run(tmp_path))
    monkeypatch.setenv("COLUMNS", "40")
    assert max(len(line) for line in health.as_text(health.diagnose(run)).splitlines() if line.startswith(" ")) <= 40


@pytest.mark.parametrize(("command", "tool"), [("health", health), ("report", report)])
def test_without_a_folder_it_is_the_newest_run(command, tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"tjepa {command}"])
    with pytest.raises(FileNotFoundError, match="tjepa pretrain"):
        tool.main()
    (tmp_path / "runs/mine").mkdir(parents=True)
    for name in ("model.safetensors", "run.json"):
        (tmp_path / "runs/mine" / name).touch()
    asked_for = []
    monkeypatch.setattr(tool, "read_run" if tool is health else "write_report", asked_for.append)
    monkeypatch.setattr(health, "diagnose", lambda run: [])
    tool.main()
    assert asked_for == [Path("runs/mine")]


def test_the_kept_runs_are_good_ones_and_the_page_tells_of_each(tmp_path):
    kept = json.loads(REFERENCE_FILE.read_text(encoding="utf-8"))
    assert len(kept) >= 3 and load_reference() == kept["quickstart"]
    for run in kept.values():
        assert run["share"][-1] == 1.0 and len(run["share"]) >= 10
        log = [dict(zip(run["curves"], line, strict=True)) for line in zip(*run["curves"].values(), strict=True)]
        log = [{**line, "step": round(share * 1000)} for line, share in zip(log, run["share"], strict=True)]
        findings = findings_of(Run(tmp_path, log, {}, max_steps=1000))
        levels = {
            findings[name].level for name in ("spread of the targets", "predictions", "directions in use", "loss")
        }
        assert levels == {"good"}
    table = runpy.run_path(str(REPOSITORY / "docs" / "plot_health.py"))["as_table"]()
    assert (
        table in (REPOSITORY / "docs" / "health.md").read_text(encoding="utf-8") and table.count("\n") == len(kept) + 1
    )


def test_keeping_curves_writes_the_file_that_is_named(tmp_path, monkeypatch):
    """And not the one that reports draw."""
    before = REFERENCE_FILE.read_bytes()
    run = make_run(tmp_path)
    curves = {"prediction_std": 0.3, "context_rank": 0.5, "prediction_rank": 0.3}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({**line, **curves}) + "\n" for line in run.log))
    (tmp_path / "run.json").write_text(json.dumps({"max_steps": 100, "seed": 3}))
    script = REPOSITORY / "docs" / "plot_health.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "kept.json"), "--keep", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    kept = json.loads((tmp_path / "kept.json").read_text())
    assert list(kept) == [tmp_path.name] and kept[tmp_path.name]["curves"]["loss"][-1] == 5.0
    assert REFERENCE_FILE.read_bytes() == before


def test_the_page_explains_every_finding():
    page = (REPOSITORY / "docs" / "health.md").read_text(encoding="utf-8")
    source = (REPOSITORY / "tools" / "health.py").read_text(encoding="utf-8")
    names = {"end", "numbers", "spread of the targets", "predictions", "directions in use", "loss", "target encoder"}
    names |= {"documents", "passes over the text", "what was learned"}
    assert all(f'"{name}"' in source and f"**{name}**" in page for name in names)
