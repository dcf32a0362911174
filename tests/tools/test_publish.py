"""`tjepa publish`: what goes to the Hub, for which hub_server.py stands in, and what does not."""

import hashlib
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from encoder_folders import make_folder
from huggingface_hub import ModelCard
from transformers import AutoModel

from helpers import arguments, run
from hub_server import card_errors, hub_in_this_process
from tjepa.tools import publish


TOKEN = "hf_thesecretofowner"
CODE = {f"{n}_tjepa.py" for n in ("configuration", "layers", "encoders", "predictors", "losses", "modeling")}
WEIGHTS = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PICTURES = {f"pictures/{name}.png" for name in ("loss", "cosine", "spread")}
MODULES = {"modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"}


@pytest.fixture
def hub(monkeypatch):
    with hub_in_this_process({TOKEN: "owner", "hf_stranger": "stranger"}, monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """The folder of a run with two checkpoints and a torn one, among things that are nobody's business."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, arguments(inputs, folder))
    for secret in ("token", "notes.log", "pictures/private.png", "1_Pooling/notes"):
        (folder / secret).parent.mkdir(exist_ok=True)
        (folder / secret).write_text(f"{TOKEN} {secret}")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_text("half")
    return folder


def start(monkeypatch, capsys, folder, *flags, repo_id="owner/tiny") -> str:
    monkeypatch.setattr(sys, "argv", ["tjepa publish", str(folder), "--repo_id", repo_id, *flags])
    publish.main()
    return capsys.readouterr().out


def make_once(export):
    """An ONNX graph takes seconds to make, and is the same each time."""
    made = []

    def export_again(encoder, path, sentence_folder=None):
        if not made:
            export(encoder, path, sentence_folder)
            made.append(path.read_bytes())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made[0])

    return export_again


def test_all_that_users_reach_for_and_nothing_else(hub, finished, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript", reason="onnx is not installed")
    monkeypatch.setattr(publish, "export_onnx", make_once(publish.export_onnx))
    dry = start(monkeypatch, capsys, finished, "--dry_run")
    assert not hub.requests and not hub.repositories
    start(monkeypatch, capsys, finished, "--token", TOKEN, "--private")

    files = hub.files("owner/tiny")
    assert hub.repositories["model", "owner/tiny"].private
    more = {"2_Dense/config.json", "2_Dense/model.safetensors", "3_Normalize/config.json", "onnx/model.onnx"}
    assert files.keys() == {".gitattributes", "README.md", *PICTURES, *CODE, *WEIGHTS, *MODULES, *more}
    assert files["model.safetensors"] == (finished / "model.safetensors").read_bytes()  # both encoders, the predictor
    tags = hub.repositories["model", "owner/tiny"].tags
    assert list(tags) == ["step-2", "step-4"]
    for step in (2, 4):
        tagged = hub.files("owner/tiny", f"step-{step}")
        assert tagged.keys() == {".gitattributes", *CODE, *WEIGHTS}
        assert tagged["model.safetensors"] == (finished / f"checkpoint-{step}" / "model.safetensors").read_bytes()

    # the dry run said exactly that
    published = {"main": files, **{tag: hub.files("owner/tiny", tag) for tag in tags}}
    said = {}
    assert dry.startswith("Health: ")
    for line in dry.splitlines()[2:]:
        if line.endswith("bytes"):
            revision = said[line.split(":")[0]] = {}
        elif line:
            size, digest, name = line.split()
            revision[name] = (int(size.replace(",", "")), digest)
    for name, content in published.items():
        expected = {path: (len(data), sha256(data)) for path, data in content.items() if path != ".gitattributes"}
        assert said[name] == expected

    # nothing of this machine
    home = os.path.dirname(torch.__file__).encode()
    for content in (data for revision in published.values() for data in revision.values()):
        for private in (TOKEN.encode(), str(finished.parent).encode(), home, str(tmp_path.parent).encode()):
            assert private not in content

    card = ModelCard(files["README.md"].decode())
    assert card_errors(card.content) == [] and card.data.model_name == "tiny" and card.data.eval_results
    assert 'AutoModel.from_pretrained("owner/tiny"' in card.text and "PATH_OR" not in card.text
    assert "| eval_loss |" in card.text and "step-2, step-4" in card.text

    # again: nothing is left to do
    commits = len(hub.repositories["model", "owner/tiny"].commits)
    uploads = sum(request.startswith("PUT /lfs") for request in hub.requests)
    start(monkeypatch, capsys, finished, "--token", TOKEN)
    assert len(hub.repositories["model", "owner/tiny"].commits) == commits
    assert sum(request.startswith("PUT /lfs") for request in hub.requests) == uploads

    check_loading_elsewhere(hub, finished, tmp_path)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def check_loading_elsewhere(hub, finished, tmp_path):
    code = """
import sys; sys.modules["tjepa"] = None
import numpy, torch
from transformers import AutoModel, AutoModelForPreTraining, AutoTokenizer
hub = {"trust_remote_code": True}
model = AutoModel.from_pretrained("owner/tiny", revision="step-2", **hub)
both = AutoModelForPreTraining.from_pretrained("owner/tiny", **hub)
tokenizer = AutoTokenizer.from_pretrained("owner/tiny", **hub)
tokens = tokenizer(["the fox", "night falls on a hen"], padding=True, return_tensors="pt")
from huggingface_hub import hf_hub_download
graph = hf_hub_download("owner/tiny", "onnx/model.onnx")
import onnxruntime
states, of_graph = onnxruntime.InferenceSession(graph).run(None, {k: v.numpy() for k, v in tokens.items()})
expected = both.target_encoder(**tokens).last_hidden_state.detach()
is_token = tokens["attention_mask"].bool()
assert torch.allclose(torch.from_numpy(states)[is_token], expected[is_token], atol=1e-5)
from sentence_transformers import SentenceTransformer
vectors = SentenceTransformer("owner/tiny", **hub).encode(["the fox", "night falls on a hen"])
assert numpy.allclose(of_graph, vectors, atol=1e-5)
numpy.savez("loaded.npz", vectors=vectors, **{n: p.detach().numpy() for n, p in model.named_parameters()})
"""
    environment = {**os.environ, **hub.environment(TOKEN), "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = dict(np.load(tmp_path / "loaded.npz"))
    vectors = loaded.pop("vectors")
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5) and abs(vectors[0] @ vectors[1]) < 0.99
    expected = AutoModel.from_pretrained(finished / "checkpoint-2")
    assert loaded.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert torch.equal(torch.from_numpy(loaded[name]), parameter), name


def test_an_interrupted_upload_goes_on(hub, finished, monkeypatch, capsys):
    flags = ("--token", TOKEN, "--no_onnx", "--no_whitening")

    def fail(*args, **kwargs):
        raise ConnectionError("the line went dead")

    with monkeypatch.context() as dead:
        dead.setattr(publish.HfApi, "create_tag", fail)
        with pytest.raises(ConnectionError):
            start(monkeypatch, capsys, finished, *flags)
    assert hub.repositories["model", "owner/tiny"].tags == {}
    uploads = sum(request.startswith("PUT /lfs") for request in hub.requests)
    start(monkeypatch, capsys, finished, *flags)
    assert list(hub.repositories["model", "owner/tiny"].tags) == ["step-2", "step-4"]
    # checkpoint-4 holds the weights of the end, which are there already
    assert sum(request.startswith("PUT /lfs") for request in hub.requests) == uploads
    assert hub.repositories["model", "owner/tiny"].messages.count("Weights of step-2") == 1

    # another run's weights do not take over a tag
    hub.repositories["model", "owner/tiny"].tags["step-2"] = hub.repositories["model", "owner/tiny"].tags["step-4"]
    with pytest.raises(ValueError, match="has the tag step-2 with other weights"):
        start(monkeypatch, capsys, finished, *flags)


def test_nothing_of_older_weights_stays(hub, finished, tmp_path, monkeypatch, capsys):
    for name in ("onnx/model.onnx", "2_Dense/model.safetensors", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of before")
    api = publish.HfApi(token=TOKEN)
    api.create_repo("owner/tiny")
    api.upload_folder(repo_id="owner/tiny", folder_path=tmp_path)
    (finished / "onnx").mkdir()
    (finished / "onnx" / "model.onnx").write_text("of another run")
    start(monkeypatch, capsys, finished, "--token", TOKEN, "--no_onnx", "--no_whitening")
    shutil.rmtree(finished / "onnx")
    files = hub.files("owner/tiny")
    assert not {"onnx/model.onnx", "2_Dense/model.safetensors"} & files.keys() and files["notes.md"] == b"of before"


def test_another_encoder_is_a_stock_repository_under_every_tag(hub, inputs, tmp_path, monkeypatch, capsys):
    bert = make_folder(tmp_path / "bert")
    values = {"tokenizer_name": None, "config_overrides": None, "max_length": 60, "max_steps": 2, "save_steps": 1}
    run(monkeypatch, arguments(inputs, tmp_path / "out", model_name_or_path=bert, **values))
    start(monkeypatch, capsys, tmp_path / "out", "--token", TOKEN, "--no_onnx")
    stock = {path.relative_to(bert).as_posix() for path in bert.rglob("*") if path.is_file()}
    inside = {f"pretraining/{name}" for name in (*CODE, *WEIGHTS)}
    main = hub.files("owner/tiny")
    there = {".gitattributes", "README.md", "pretraining/masking_strategies.json"}
    assert main.keys() == {*stock, *inside, *there}
    tagged = hub.files("owner/tiny", "step-1")
    assert tagged.keys() == {".gitattributes", *stock, *inside}
    assert tagged["model.safetensors"] != main["model.safetensors"]
    assert main["model.safetensors"] == hub.files("owner/tiny", "step-2")["model.safetensors"]


@pytest.mark.parametrize(
    "flags, error",
    [
        (("--token", "hf_mistyped"), "does not give access to owner/tiny"),
        (("--no_whitening", "--whitening_file=x.txt"), "--no_whitening has no use for"),
        (("--dry_run", "--repo_id", "a bad name"), "Repo id must"),
    ],
)
def test_refused_before_the_work(hub, finished, monkeypatch, capsys, flags, error):
    monkeypatch.setattr(publish, "stage", None)
    with pytest.raises((ValueError, PermissionError), match=error):
        start(monkeypatch, capsys, finished, *flags)


def test_what_cannot_be_published_leaves_no_repository(hub, finished, tmp_path, monkeypatch, capsys):
    (tmp_path / "few.txt").write_text("Too few for a whitening.")
    with pytest.raises(ValueError, match="too few to whiten"):
        flags = ("--token", TOKEN, "--no_onnx", "--whitening_file", str(tmp_path / "few.txt"))
        start(monkeypatch, capsys, finished, *flags)
    with pytest.raises(PermissionError, match="does not give access to owner/tiny"):
        start(monkeypatch, capsys, finished, "--token", "hf_stranger", "--no_onnx", "--no_whitening")
    assert not hub.repositories
    start(monkeypatch, capsys, finished, "--token", TOKEN, "--no_onnx", "--no_whitening", repo_id="tiny")
    assert list(hub.repositories) == [("model", "owner/tiny")]


def test_a_folder_that_is_not_a_finished_run(finished, monkeypatch, capsys):
    monkeypatch.setattr(publish, "whitening_texts", lambda *args: None)
    with pytest.raises(ValueError, match="is not the folder of a finished pretraining run"):
        start(monkeypatch, capsys, finished / "checkpoint-2")


def test_modules_elsewhere_are_not_followed(finished, tmp_path):
    from tjepa.training.model_folder import sentence_files

    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "."}, {"path": "../secrets"}]')
    (tmp_path / "token").write_text(TOKEN)
    assert sentence_files(tmp_path) == ["modules.json"]
