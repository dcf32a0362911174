"""Safe by default: nothing that is read runs code, nothing is written elsewhere, no secret goes anywhere."""

import ast
import functools
import json
import os
import pickle
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from helpers import REPOSITORY, arguments, make_texts, run
from tjepa import TJEPAForPreTraining, TJEPAModel
from tjepa.corpus import prepare_dataset
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.tools.convert_checkpoint import convert_checkpoint


SHIPPED = sorted(
    path
    for path in REPOSITORY.rglob("*.py")
    if path.relative_to(REPOSITORY).parts[0] not in ("tests", "build", ".venv")
)
LONGER = {"max_steps": 4, "extend_schedule": "warm_up_again"}  # than the two steps before
SECRETS = ("hf_secretinthecommandline", "hf_secretforpushing", "hf_secretoftheenvironment")


class Payload:
    """Unpickled without care it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def inputs(tmp_path) -> Path:
    for name, seed in (("train", 0), ("validation", 1)):
        rows = [json.dumps({"text": text}) for text in make_texts(24, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    train_tokenizer(make_texts(60), vocab_size=300, model_max_length=64).save_pretrained(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def marker(tmp_path):
    """What the malicious files of these tests would make; it must not be there at the end."""
    yield tmp_path / "code-was-run"
    assert not (tmp_path / "code-was-run").exists()


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


# ---- weights and other binary files ----


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForSequenceClassification, TJEPAForPreTraining])
def test_weights_are_safetensors_only(make_model, tmp_path, marker, auto_class):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    assert not [p for p in (tmp_path / "model").iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]

    weights = {**load_file(tmp_path / "model" / "model.safetensors"), "payload": Payload(marker)}
    torch.save(weights, tmp_path / "model" / "pytorch_model.bin")
    auto_class.from_pretrained(tmp_path / "model")  # not looked at beside a safetensors file

    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(OSError, match="no file named model.safetensors"):
        auto_class.from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="safetensors files only"):
        auto_class.from_pretrained(tmp_path / "model", use_safetensors=False)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_runs_nothing(inputs, marker, monkeypatch, file):
    output_dir = inputs / "out"
    run(monkeypatch, arguments(inputs, output_dir, max_steps=2))
    torch.save(Payload(marker), output_dir / "checkpoint-2" / file)
    (output_dir / "checkpoint-2" / "checkpoint_complete.json").unlink()  # it knows the size of the real file
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        run(monkeypatch, arguments(inputs, output_dir, **LONGER, resume_from_checkpoint=output_dir / "checkpoint-2"))


def test_pickled_arguments_are_never_read(inputs, marker, monkeypatch):
    output_dir = inputs / "out"
    run(monkeypatch, arguments(inputs, output_dir, max_steps=2))
    torch.save(Payload(marker), output_dir / "checkpoint-2" / "training_args.bin")
    (output_dir / "checkpoint-2" / "checkpoint_complete.json").unlink()  # it knows the size of the real file
    run(monkeypatch, arguments(inputs, output_dir, **LONGER, resume_from_checkpoint=output_dir / "checkpoint-2"))
    assert json.loads((output_dir / "trainer_state.json").read_text())["global_step"] == 4


@pytest.mark.parametrize("file", ["context_encoder.pt", "target_encoder.pt", "predictor.pt"])
def test_the_converter_runs_nothing(tmp_path, marker, file):
    reference = tmp_path / "reference"
    reference.mkdir()
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_n_embd": 8, "dropout": 0.0, "bias": True}
    encoder = {**sizes, "vocab_size": 60, "block_size": 64}
    (reference / "encoder_config.json").write_text(json.dumps(encoder))
    (reference / "predictor_config.json").write_text(
        json.dumps({**sizes, "ext_n_embd": 32, "trainable_mask_emb": True})
    )
    for part in ("context_encoder", "target_encoder", "predictor"):
        torch.save({}, reference / f"{part}.pt")
    torch.save({"transformer.wte.weight": Payload(marker)}, reference / file)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        convert_checkpoint(reference, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


# ---- code that comes with models, tokenizers and data ----


def write_code(path: Path, marker: Path) -> None:
    path.write_text(f"import os\nos.mkdir({str(marker)!r})\n")


def test_remote_code_is_off(inputs, make_model, marker, monkeypatch):
    """A model folder, a tokenizer and a dataset that bring code of their own, as everyone can put on the Hub."""
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # nobody there to say yes
    make_model(vocab_size=300).save_pretrained(inputs / "model")
    for name in ("modeling_tjepa.py", "configuration_tjepa.py"):
        write_code(inputs / "model" / name, marker)
    names = {"model_name_or_path": inputs / "model", "config_overrides": None}
    run(monkeypatch, arguments(inputs, inputs / "out", max_steps=1, **names))

    tokenizer_config = json.loads((inputs / "tokenizer" / "tokenizer_config.json").read_text())
    tokenizer_config["auto_map"] = {"AutoTokenizer": [None, "tokenization_evil.Evil"]}
    tokenizer_config["tokenizer_class"] = "Evil"
    (inputs / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    write_code(inputs / "tokenizer" / "tokenization_evil.py", marker)
    with pytest.raises(ValueError, match="trust_remote_code"):
        run(monkeypatch, arguments(inputs, inputs / "out2", max_steps=1))

    (inputs / "dataset").mkdir()
    write_code(inputs / "dataset" / "dataset.py", marker)
    with pytest.raises((RuntimeError, ValueError, FileNotFoundError)):
        run(monkeypatch, arguments(inputs, inputs / "out3", train_file=None, dataset_name=inputs / "dataset"))


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, with its dotted name."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str, str]:
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_shipped_code_has_no_shell_no_eval_and_no_pickle(path):
    forbidden = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"}
    forbidden |= {
        "pickle.load",
        "pickle.loads",
        "joblib.load",
        "yaml.load",
        "yaml.unsafe_load",
        "subprocess.getstatusoutput",
    }
    for name, call in calls(path):
        given = keywords(call)
        assert name not in forbidden, f"{path}:{call.lineno} calls {name}"
        assert given.get("shell", "False") == "False", f"{path}:{call.lineno} starts a shell"
        assert given.get("trust_remote_code") != "True", f"{path}:{call.lineno} trusts remote code unasked"
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"{path}:{call.lineno} unpickles"
        if name in ("np.load", "numpy.load"):
            assert given.get("allow_pickle", "False") == "False", f"{path}:{call.lineno} unpickles"


# ---- nothing is written elsewhere ----


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_names_in_files_do_not_become_paths(inputs, monkeypatch):
    """A chat template and a strategy can have names; neither may lead out of the output folder."""
    deep = inputs / "a" / "b" / "out"
    strategies = [{"target_block_size_mean": 3, "name": "../../../../escaped"}]
    (inputs / "strategies.json").write_text(json.dumps(strategies))
    with pytest.raises(ValueError, match="name"):
        run(monkeypatch, arguments(inputs, deep, masking_strategies=inputs / "strategies.json"))

    config = json.loads((inputs / "tokenizer" / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": ""}, {"name": "../../escaped", "template": ""}]
    (inputs / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    before = tree(inputs)
    with pytest.raises(ValueError, match="chat template"):
        run(monkeypatch, arguments(inputs, deep, max_steps=2))
    assert {path for path in tree(inputs) - before if not path.startswith(("a", "cache"))} == set()
    assert not [path for path in tree(inputs) if "escaped" in path]


@pytest.mark.parametrize("repo_id", ["../../escaped", "owner/../escaped", "a/b/c"])
def test_names_on_the_hub_are_checked(inputs, monkeypatch, repo_id):
    with pytest.raises(ValueError, match="Repo id must"):
        run(monkeypatch, arguments(inputs, inputs / "out", push_to_hub=True, hub_model_id=repo_id))
    assert not (inputs / "out").exists()


def test_preparing_writes_only_its_folder(inputs, monkeypatch):
    monkeypatch.chdir(inputs)
    (inputs / "work").mkdir()
    files = {"train_file": str(inputs / "*.jsonl"), "tokenizer_name": str(inputs / "tokenizer"), "min_tokens": 2}
    before = tree(inputs)
    prepare_dataset.prepare_dataset(
        prepare_dataset.PreparationArguments(**files, output_dir="work/../prepared", text_column_name="text")
    )
    assert {path.split(os.sep)[0] for path in tree(inputs) - before} == {"prepared"}
    with pytest.raises(FileExistsError, match="is not a prepared dataset"):
        prepare_dataset.prepare_dataset(
            prepare_dataset.PreparationArguments(**files, output_dir="prepared/..", overwrite_output_dir=True)
        )


# ---- secrets ----


def test_tokens_are_nowhere(inputs, monkeypatch, capfd, caplog):
    monkeypatch.setenv("HF_TOKEN", SECRETS[2])
    tokens = {"token": SECRETS[0], "hub_token": SECRETS[1], "report_to": "tensorboard"}
    run(monkeypatch, arguments(inputs, inputs / "out", max_steps=2, log_level="debug", **tokens))
    printed = "".join(capfd.readouterr()) + caplog.text
    written = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    assert {"README.md", "training_args.bin", "trainer_state.json"} <= {path.name for path in written}
    for secret in SECRETS:
        assert secret not in printed
        assert not [path for path, content in written.items() if secret.encode() in content]


class SilentFileServer(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def data_url(inputs):
    """A file on a web server, whose address holds a key."""
    handler = functools.partial(SilentFileServer, directory=inputs)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/train.jsonl?X-Signature={SECRETS[0]}"
        server.shutdown()


def test_a_key_in_a_url_stays_there(inputs, data_url, monkeypatch, caplog, capfd):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # the server is on this machine
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    run(monkeypatch, arguments(inputs, inputs / "out", max_steps=1, train_file=data_url))
    prepared = prepare_dataset.PreparationArguments(
        train_file=data_url,
        tokenizer_name=str(inputs / "tokenizer"),
        output_dir=str(inputs / "prepared"),
        min_tokens=2,
    )
    prepare_dataset.prepare_dataset(prepared)
    with pytest.raises(ValueError, match="extension") as error:
        prepare_dataset.load_documents(prepare_dataset.DataArguments(train_file=data_url.replace("jsonl", "html")))
    for folder in ("out", "prepared"):
        assert not [p for p in (inputs / folder).rglob("*") if p.is_file() and SECRETS[0].encode() in p.read_bytes()]
    assert "train.jsonl" in (inputs / "out" / "README.md").read_text()
    assert SECRETS[0] not in str(error.value) + caplog.text + "".join(capfd.readouterr())


def test_what_is_secret_in_a_url():
    url = "https://user:password@host.example/data/train.parquet?X-Signature=secret#part"
    assert prepare_dataset.without_query(url) == "https://host.example/data/train.parquet"
    assert prepare_dataset.without_query("data/a folder/train-?.parquet") == "data/a folder/train-?.parquet"


def test_an_encoder_folder_names_no_local_path(make_model, tmp_path):
    """Where a model was loaded from is nobody's business."""
    make_model().save_pretrained(tmp_path / "model")
    TJEPAModel.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "encoder")
    assert str(tmp_path) not in (tmp_path / "encoder" / "config.json").read_text()
    tokenizer = train_tokenizer(make_texts(60), vocab_size=300, model_max_length=64)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer").save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "tokenizer_config.json").read_text()
