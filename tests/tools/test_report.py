"""`tjepa report`: the page of a finished run, of one that crashed, and of other encoders; it never ends a run."""

import json
import re
import sys

import pytest
import torch
from encoder_folders import make_folder
from transformers import AutoModel

from fault_injection import Fault, InjectedError
from helpers import arguments, make_texts, run
from tjepa import cli, run_pretraining
from tjepa.tools import pictures, report
from tjepa.training.record import read_run


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "max_length": 32}
NUM_CURVES = 11  # with one figure of documents


@pytest.fixture(scope="module")
def texts(inputs):
    """More held-out texts, which a map needs; one of them is markup."""
    texts = [*make_texts(15, 1), "<b>the</b> fox & the hen"]
    rows = "\n".join(json.dumps({"text": text}) for text in texts)
    (inputs / "held_out.jsonl").write_text(rows)
    return inputs / "held_out.jsonl"


def write(monkeypatch, folder) -> str:
    monkeypatch.setattr(sys, "argv", ["tjepa", "report", str(folder)])
    cli.main()
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_finished_run(inputs, texts, tmp_path, monkeypatch, with_reports, capsys):
    out = tmp_path / "out"
    run(monkeypatch, arguments(inputs, out, validation_file=texts, hub_token="hf_secret", **EVALUATED))
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == NUM_CURVES + 2  # maps of the trained and of the untrained encoder
    assert not re.findall(r'(?:src|href)="(?!#)|url\((?!#)|@import', page)  # one file, no network
    assert "collapsed</text>" in page  # the threshold is drawn in
    assert page.count(" hidden</span>") == 7 and 'class="a"' in page  # each strategy of UL2
    assert "Trained encoder</span>" in page and "Untrained encoder</span>" in page  # neighbours
    assert "empty or whitespace only" in page and "optimizer step" in page and "accelerate" in page
    assert "&lt;b&gt;the" in page and "<b>the" not in page
    assert page.index('id="health"') < page.index("<svg")  # the first section
    written = page + (out / "run.json").read_text()
    assert "hf_secret" not in written
    card = (out / "README.md").read_text()
    shown = re.findall(r"!\[.+\]\((.+\.png)\)", card)
    assert shown == ["pictures/loss.png", "pictures/cosine.png", "pictures/map.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    lines = capsys.readouterr().out.strip().splitlines()[-3:]
    assert [line.split()[0] for line in lines] == ["Model", "Good?", "Next"]
    assert str(out) in lines[0] and f"--model {out}" in lines[2]


def test_a_crashed_run(inputs, texts, tmp_path, monkeypatch, with_reports):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        Fault("optimizer", "exception", step=4).install(patch)
        run(patch, arguments(inputs, out, validation_file=texts, **EVALUATED))
    at_save = (out / "report.html").read_text(encoding="utf-8")  # of step 2
    assert at_save.count("<svg") == NUM_CURVES and "Made at the end of the run" in at_save
    page = write(monkeypatch, out)
    assert page.count("<svg") == NUM_CURVES + 2 and "Untrained encoder</span>" in page
    assert "3 of 4 steps" in page and "--resume_from_checkpoint last" in page


def test_a_run_that_crashed_before_its_first_checkpoint(inputs, texts, tmp_path, monkeypatch, with_reports):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(InjectedError):
        Fault("optimizer", "exception", step=2).install(patch)
        run(patch, arguments(inputs, out, validation_file=texts))
    page = write(monkeypatch, out)
    assert page.count("<svg") == NUM_CURVES and page.count("before its first checkpoint") == 5


EVALUATION = {"eval_loss": 5.0, "eval_target_std": 0.9, "eval_cosine": 0.4, "eval_mean_target_cosine": 0.3}
EVALUATION |= {"eval_target_rank": 0.5, "eval_loss_a": 5.0, "step": 60}
STEP = {"step": 60, "loss": 5.0}


@pytest.mark.parametrize(
    ("log", "settings", "max_steps", "reasons"),
    [
        ([EVALUATION], {"logging_steps": 100}, 60, {"60 steps was shorter than --logging_steps, which is 100.": 5}),
        ([EVALUATION], {}, 900, {"No step is in the log yet: the first comes after --logging_steps.": 5}),
        ([EVALUATION], {"logging_strategy": "no"}, 60, {"--logging_strategy is no.": 5}),
        ([STEP], {"probe_file": "a.csv"}, 60, {"no line of its log holds it": 9, "judged at evaluations": 1}),
        ([STEP], {}, 60, {"given no labelled texts": 1, "what became of its documents": 1}),
    ],
)
def test_an_empty_card_says_why(log, settings, max_steps, reasons, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (tmp_path / "run.json").write_text(json.dumps({"settings": settings, "max_steps": max_steps}))
    report.write_report(tmp_path, with_encoders=False)
    page = (tmp_path / "report.html").read_text()
    assert {reason: page.count(reason) for reason in reasons} == reasons
    section = page[page.index("<h2>Loss") : page.index("<h2>What each strategy")]
    assert section.count('class="missing"') + section.count("<svg") == NUM_CURVES + 1  # all of them, and the probe


def test_the_untrained_encoder_is_the_one_of_the_start(inputs, texts, tmp_path, monkeypatch):
    """Made again from the seed; with another one the panel says that it is not the same."""
    out = tmp_path / "out"
    flags = {"max_steps": 1, "learning_rate": 1e-12, "start_lr": 0, "final_lr": 0, "ema_momentum": 1, "seed": 3}
    run(monkeypatch, arguments(inputs, out, validation_file=texts, **flags))
    record = read_run(out)
    vectors, missing = report.embed_with_both(record, out)
    assert not missing and abs(vectors["Trained"] - vectors["Untrained"]).max() < 1e-6  # nothing was trained
    record.seed = 4
    vectors, missing = report.embed_with_both(record, out)
    assert list(vectors) == ["Trained"] and "seed 4 gives other weights" in missing["Untrained"]


def test_another_encoder(tmp_path, monkeypatch, with_reports):
    encoder, out = make_folder(tmp_path / "bert"), tmp_path / "out"
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(60)))
    (tmp_path / "held_out.txt").write_text("\n".join(make_texts(30, 1)))
    flags = ["--train_file", tmp_path / "texts.txt", "--validation_file", tmp_path / "held_out.txt", "--max_length=32"]
    argv = [
        "tjepa",
        "adapt",
        encoder,
        *flags,
        "--max_steps=2",
        "--output_dir",
        out,
        "--report_before_after=false",
        "--logging_steps=1",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, [*argv, "--learning_rate=1e-12", "--head_learning_rate=1e-12"])))
    cli.main()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Untrained encoder</span>" in page and page.count("<svg") == NUM_CURVES + 2
    record = read_run(out)
    assert record.started_from == str(encoder) and not record.labels
    started_with = report.untrained_encoder(record, out / "pretraining", report.load_tokenizer(str(out)))
    weights = AutoModel.from_pretrained(encoder).state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in started_with.state_dict().items())
    (encoder / "model.safetensors").unlink()
    assert "Untrained" in report.embed_with_both(record, out / "pretraining")[1]  # says why


def test_labels_colour_the_map(tmp_path):
    points = torch.randn(40, 2).numpy()
    labels = [f"class {index % 20}" for index in range(40)]
    svg = pictures.as_svg(pictures.draw_map("Trained encoder", points, labels))
    assert svg.count(">class ") == pictures.MAX_CLASSES and ">others<" in svg


@pytest.mark.parametrize(
    ("module", "function", "what"),
    [(pictures, "as_svg", "The report"), (run_pretraining, "texts_to_keep", "The run's record")],
)
def test_a_failure_is_a_warning(inputs, tmp_path, monkeypatch, with_reports, caplog, module, function, what):
    def fail(*args):
        raise RuntimeError("no ink")

    monkeypatch.setattr(module, function, fail)
    run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=2))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert f"{what} could not be written (RuntimeError: no ink)" in caplog.text


def test_what_is_not_a_run(tmp_path, monkeypatch, capsys):
    for folder, message in ((tmp_path, "is not the folder of a pretraining run"), (tmp_path / "no", "no folder")):
        with pytest.raises(SystemExit) as end:
            write(monkeypatch, folder)
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
