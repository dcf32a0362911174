"""The Hub end to end: real clients in processes of their own, against the stand-in of hub_server.py on loopback."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from encoder_folders import make_folder
from huggingface_hub import ModelCard
from pyarrow import parquet
from safetensors.torch import load

from helpers import REPOSITORY, TINY, arguments, make_texts, run
from hub_server import card_errors, hub_in_this_process, serve_hub
from tjepa.corpus.train_tokenizer import train_tokenizer


TOKEN, STRANGERS_TOKEN = "hf_thesecretofowner", "hf_thesecretofstranger"
MODEL_FILES = {
    "config.json",
    "configuration_tjepa.py",
    "model.safetensors",
    "modeling_tjepa.py",
    "layers_tjepa.py",
    "encoders_tjepa.py",
    "predictors_tjepa.py",
    "losses_tjepa.py",
}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
PICTURES = {f"pictures/{name}.png" for name in ("loss", "cosine", "map")}
PUBLISHED = {".gitattributes", "README.md", *MODEL_FILES, *TOKENIZER_FILES, *PICTURES}


@pytest.fixture
def hub():
    with serve_hub({TOKEN: "owner", STRANGERS_TOKEN: "stranger"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(60)))
    train_tokenizer(make_texts(60), vocab_size=300, model_max_length=64).save_pretrained(folder / "tokenizer")
    return folder


def run_process(arguments: list, hub, home: Path, token: str | None = None, xet: bool = False):
    """A client of the Hub in an empty home folder, where no login is stored."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {**hub.environment(token), "HF_HOME": str(home / "hf"), "HOME": str(home)}
    if xet:
        del environment["HF_HUB_DISABLE_XET"]
    home.mkdir(parents=True, exist_ok=True)
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


def pretrain(hub, inputs: Path, output_dir: Path, login: str | None = None, xet: bool = False, **overrides):
    values = {
        "train_file": inputs / "train.jsonl",
        "validation_split_percentage": 20,
        "tokenizer_name": inputs / "tokenizer",
        "config_overrides": TINY,
        "max_length": 64,
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 8,
        "report_to": "none",
        "output_dir": output_dir,
        "push_to_hub": True,
        "hub_model_id": "owner/name",
    }
    flags = [f"--{name}={value}" for name, value in {**values, **overrides}.items() if value is not None]
    home = output_dir.parent / "home"
    return run_process([REPOSITORY / "run_pretraining.py", *flags], hub, home, login, xet)


def run_elsewhere(code: str, hub, home: Path, token: str | None = None) -> str:
    """Code in a clean process that cannot import the package; what it prints."""
    result = run_process(["-c", "import sys; sys.modules['tjepa'] = None\n" + code], hub, home, token)
    assert result.returncode == 0, result.stderr
    return result.stdout


def messages(hub, repo_id: str = "owner/name") -> list[str]:
    return hub.repositories["model", repo_id].messages


# ---- run_pretraining.py --push_to_hub ----


def test_a_hub_that_cannot_be_reached_is_an_error_in_one_line(inputs, tmp_path):
    """With the HTTP library that is installed: a port at which nobody listens."""
    flags = {"push_to_hub": True, "hub_model_id": "owner/name", "hub_token": TOKEN, "report_to": "none"}
    command = [sys.executable, "-m", "tjepa.run_pretraining", *arguments(inputs, tmp_path / "out", **flags)]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert "The Hub cannot be reached to ask for access to owner/name" in done.stderr


def test_pushed_by_the_script_and_loaded_elsewhere(hub, inputs, tmp_path):
    """Data, tokenizer and destination by their names on the Hub, the first two private."""
    output_dir = tmp_path / "run"
    add_data_and_tokenizer(hub, inputs)
    names = {"train_file": None, "dataset_name": "owner/data", "tokenizer_name": "owner/tokenizer"}
    pushed = pretrain(hub, inputs, output_dir, token=TOKEN, hub_strategy="end", report_to="tensorboard", **names)
    assert pushed.returncode == 0, pushed.stderr
    files = hub.files("owner/name")
    assert files.keys() == PUBLISHED
    assert all((output_dir / name).read_bytes() == files[name] for name in PUBLISHED - {".gitattributes"})
    assert (output_dir / "checkpoint-2").is_dir() and (output_dir / "trainer_state.json").is_file()  # stay at home
    assert messages(hub) == ["initial", "End of training"]

    # the token is nowhere: not in what was printed, not in any file, pickled arguments included
    assert TOKEN not in pushed.stdout + pushed.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in written)
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]

    code = """
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForSequenceClassification, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(NAME, trust_remote_code=True)
tokens = tokenizer(["the fox sees a red hen", "night falls"], padding=True, return_tensors="pt")
model, info = AutoModel.from_pretrained(NAME, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
AutoModelForPreTraining.from_pretrained(NAME, trust_remote_code=True)
head, info = AutoModelForSequenceClassification.from_pretrained(
    NAME, trust_remote_code=True, num_labels=3, output_loading_info=True
)
assert all(name.startswith("classifier") for name in info["missing_keys"]), info
assert head(**tokens).logits.shape == (2, 3)
assert head.encoder.token_embedding.weight.equal(model.token_embedding.weight)
with torch.no_grad():
    print(model(**tokens).last_hidden_state.double().tolist())
"""
    from_hub = run_elsewhere(code.replace("NAME", "'owner/name'"), hub, tmp_path / "elsewhere")
    from_folder = run_elsewhere(code.replace("NAME", repr(str(output_dir))), hub, tmp_path / "elsewhere")
    assert from_hub == from_folder and len(from_hub) > 100
    assert any(request.startswith("GET /cdn/") for request in hub.requests)  # redirected, as large files are
    check_card(files["README.md"].decode(), json.loads((output_dir / "all_results.json").read_text()))


def add_data_and_tokenizer(hub, inputs: Path) -> None:
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": make_texts(60)}), table)
    hub.add("owner/data", {"data/train-00000-of-00001.parquet": table.getvalue()}, "dataset", private=True)
    tokenizer = {path.name: path.read_bytes() for path in (inputs / "tokenizer").iterdir()}
    hub.add("owner/tokenizer", tokenizer, private=True)


def check_card(content: str, results: dict) -> None:
    assert card_errors(content) == []
    card = ModelCard(content)
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert "t-jepa" in card.data.tags and card.data.datasets == ["owner/data"]
    assert card.data.model_name == "name"
    assert 'AutoModel.from_pretrained("owner/name", trust_remote_code=True)' in card.text
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["eval_loss"] == pytest.approx(results["eval_loss"], abs=1e-5)
    assert all(result.dataset_type == "owner/data" for result in card.data.eval_results)


def test_a_push_at_every_save_and_a_second_run(hub, inputs, tmp_path):
    pushed = pretrain(hub, inputs, tmp_path / "run", TOKEN, hub_private_repo=True, hub_always_push=True)
    assert pushed.returncode == 0, pushed.stderr
    steps = ["Training in progress, step 1", "Training in progress, step 2"]
    assert messages(hub) == ["initial", *steps, "End of training"]
    assert hub.files("owner/name").keys() == PUBLISHED
    assert hub.repositories["model", "owner/name"].private
    assert run_process(["-c", "from transformers import AutoConfig; AutoConfig.from_pretrained('owner/name')"],
                       hub, tmp_path / "stranger", STRANGERS_TOKEN).returncode != 0  # fmt: skip

    commits = hub.repositories["model", "owner/name"].commits
    assert len(commits) == 4
    first_weights = load(hub.files("owner/name")["model.safetensors"])
    before = tmp_path / "before"
    (before / "2_Dense").mkdir(parents=True)
    for name in ("modules.json", "2_Dense/model.safetensors", "notes.md"):  # the first two belong to the weights
        (before / name).write_text("of before")
    code = (
        f"from huggingface_hub import HfApi; HfApi().upload_folder(repo_id='owner/name', folder_path={str(before)!r})"
    )
    assert run_process(["-c", code], hub, tmp_path / "home", TOKEN).returncode == 0
    add_data_and_tokenizer(hub, inputs)
    streamed = {"train_file": None, "dataset_name": "owner/data", "streaming": True, "max_eval_samples": 10}
    again = pretrain(hub, inputs, tmp_path / "again", TOKEN, seed=7, hub_strategy="end", **streamed)
    assert again.returncode == 0, again.stderr
    assert messages(hub)[5:] == ["End of training"] and len(commits) == 6
    files = hub.files("owner/name")
    assert not {"modules.json", "2_Dense/model.safetensors"} & files.keys() and files["notes.md"] == b"of before"
    second_weights = load(hub.files("owner/name")["model.safetensors"])
    assert first_weights.keys() == second_weights.keys()
    assert not first_weights["predictor.mask_token"].equal(second_weights["predictor.mask_token"])


def test_checkpoints_go_to_the_hub_only_when_asked_for(hub, inputs, tmp_path):
    overrides = {"hub_strategy": "checkpoint", "hub_revision": "wip", "save_steps": 2, "hub_token": TOKEN}
    pushed = pretrain(hub, inputs, tmp_path / "run", **overrides)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.files("owner/name").keys() == {".gitattributes"}  # main is left alone
    files = hub.files("owner/name", "wip")
    checkpoint = {path.removeprefix("last-checkpoint/") for path in files if path.startswith("last-checkpoint/")}
    assert {path for path in files if not path.startswith("last-checkpoint/")} == PUBLISHED
    assert checkpoint == {path.name for path in (tmp_path / "run" / "checkpoint-2").iterdir()}
    assert {"optimizer.pt", "trainer_state.json"} <= checkpoint
    assert b'from_pretrained("owner/name", revision="wip", trust_remote_code=True)' in files["README.md"]
    assert not [path for path, content in files.items() if TOKEN.encode() in content]


def test_the_default_client_with_xet(inputs, tmp_path):
    """With hf_xet the client uploads folders another way. What is stored as Xet needs Xet's servers; text does not."""
    with serve_hub({TOKEN: "owner"}, lfs_suffixes=()) as hub:
        pushed = pretrain(hub, inputs, tmp_path / "run", TOKEN, xet=True, hub_strategy="end")
        assert pushed.returncode == 0, pushed.stderr
        assert hub.files("owner/name").keys() == PUBLISHED


def test_another_encoder_comes_from_the_hub_and_goes_there_as_it_came(hub, inputs, tmp_path):
    folder = make_folder(tmp_path / "bert")
    there = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("owner/encoder", there, private=True)
    names = {"model_name_or_path": "owner/encoder", "tokenizer_name": None, "config_overrides": None}
    pushed = pretrain(hub, inputs, tmp_path / "run", TOKEN, max_length=60, **names)
    assert pushed.returncode == 0, pushed.stderr
    files = hub.files("owner/name")
    assert {path for path in files if not path.startswith(("pretraining/", "pictures/"))} == {
        ".gitattributes",
        "README.md",
        *there,
    }
    same = ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json")
    assert all(files[name] == there[name] for name in same)
    pretraining = {path.removeprefix("pretraining/") for path in files if path.startswith("pretraining/")}
    assert pretraining == {*MODEL_FILES, *TOKENIZER_FILES, "masking_strategies.json"}
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card_errors(card.content) == [] and card.data.base_model == "owner/encoder"


@pytest.mark.parametrize(
    ("token", "problem"),
    [("hf_mistyped", "Invalid user token"), (STRANGERS_TOKEN, "don't have the rights")],
)
def test_refused_before_anything_is_trained(hub, inputs, tmp_path, token, problem):
    refused = pretrain(hub, inputs, tmp_path / "run", hub_token=token)
    assert refused.returncode != 0
    error = refused.stderr.splitlines()[-1]  # one line, and no traceback
    assert error.startswith("run_pretraining.py: error: The Hub does not give access to owner/name"), refused.stderr
    assert problem in refused.stderr and "--hub_token" in refused.stderr
    assert token not in refused.stdout + refused.stderr
    assert not list((tmp_path / "run").glob("*")) and not hub.repositories


def test_a_token_for_reading_shows_before_the_data(inputs, tmp_path, monkeypatch):
    values = {"train_file": tmp_path / "none.jsonl", "push_to_hub": True, "hub_model_id": "owner/name"}
    with hub_in_this_process({TOKEN: "owner"}, monkeypatch) as hub:
        hub.token_role = "read"
        with pytest.raises(PermissionError, match="may only read, and owner/name is to be written: .* as --hub_token"):
            run(monkeypatch, arguments(inputs, tmp_path / "out", hub_token=TOKEN, report_to="none", **values))
        hub.token_role = "fineGrained"  # for which repositories is not said: creating it will tell
        with pytest.raises(FileNotFoundError):
            run(monkeypatch, arguments(inputs, tmp_path / "out", hub_token=TOKEN, report_to="none", **values))


def test_a_wrong_token_shows_before_the_data_and_wrong_data_leave_no_repository(inputs, tmp_path, monkeypatch):
    values = {"train_file": tmp_path / "none.jsonl", "validation_file": None, "push_to_hub": True}
    values |= {"hub_model_id": "owner/name", "report_to": "none"}
    with hub_in_this_process({TOKEN: "owner"}, monkeypatch) as hub:
        with pytest.raises(PermissionError, match="does not give access to owner/name"):
            run(monkeypatch, arguments(inputs, tmp_path / "out", hub_token="hf_mistyped", **values))
        with pytest.raises(FileNotFoundError):
            run(monkeypatch, arguments(inputs, tmp_path / "out", hub_token=TOKEN, **values))
        values |= {"train_file": inputs / "train.jsonl", "validation_split_percentage": 0, "eval_strategy": "steps"}
        with pytest.raises(ValueError, match="there is no validation split"):
            run(monkeypatch, arguments(inputs, tmp_path / "out", hub_token=TOKEN, **values))
        assert any("whoami" in request for request in hub.requests) and not hub.repositories


def test_a_push_that_fails_at_the_end_loses_nothing(hub, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(type(hub), "accepts_commits", False)
    failed = pretrain(hub, inputs, tmp_path / "run", TOKEN)
    assert failed.returncode != 0
    assert "step 1: the push to owner/name failed" in failed.stderr  # and training went on
    assert "RuntimeError: The push to owner/name failed, but nothing is lost" in failed.stderr
    assert all((tmp_path / "run" / name).is_file() for name in PUBLISHED - {".gitattributes"})
    assert hub.files("owner/name").keys() == {".gitattributes"}


# ---- from Python ----


def test_pushed_from_python(hub, inputs, tmp_path):
    code = f"""
import torch
from transformers import AutoTokenizer
from tjepa import TJEPAConfig, TJEPAForPreTraining, TJEPAForSequenceClassification, TJEPAModel
torch.manual_seed(0)
config = TJEPAConfig(vocab_size=300, **dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, rotary_dim=8))
model = TJEPAForPreTraining(config)
model.push_to_hub("owner/pretraining", private=True, commit_message="first")
tokenizer = AutoTokenizer.from_pretrained({str(inputs / "tokenizer")!r})
tokenizer.push_to_hub("owner/pretraining")
encoder = TJEPAModel.from_pretrained("owner/pretraining")
assert encoder.token_embedding.weight.equal(model.target_encoder.token_embedding.weight)
encoder.push_to_hub("owner/encoder")
head = TJEPAForSequenceClassification.from_pretrained("owner/encoder", num_labels=2)
head.push_to_hub("owner/head", tags=["sentiment"])
torch.save(head(torch.tensor([[5, 6, 7]])).logits, "logits.pt")
"""
    pushed = run_process(["-c", code], hub, tmp_path / "home", TOKEN)
    assert pushed.returncode == 0, pushed.stderr
    assert hub.files("owner/pretraining").keys() == {".gitattributes", "README.md", *MODEL_FILES, *TOKENIZER_FILES}
    assert messages(hub, "owner/pretraining") == ["initial", "first", "Upload tokenizer"]
    for name in ("owner/encoder", "owner/head"):
        assert hub.files(name).keys() == {".gitattributes", "README.md", *MODEL_FILES}
    loaded = f"""
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
AutoTokenizer.from_pretrained("owner/pretraining", trust_remote_code=True)
model = AutoModel.from_pretrained("owner/pretraining", trust_remote_code=True)
encoder = AutoModel.from_pretrained("owner/encoder", trust_remote_code=True)
for (name, a), (_, b) in zip(model.state_dict().items(), encoder.state_dict().items(), strict=True):
    assert a.equal(b), name
head = AutoModelForSequenceClassification.from_pretrained("owner/head", trust_remote_code=True)
expected = torch.load({str(tmp_path / "home" / "logits.pt")!r}, weights_only=True)
assert torch.equal(head(torch.tensor([[5, 6, 7]])).logits, expected)
"""
    run_elsewhere(loaded, hub, tmp_path / "elsewhere", TOKEN)
