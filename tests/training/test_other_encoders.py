"""Runs that go on with an encoder of another architecture: what they write, how they resume, and what they refuse."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from encoder_folders import make_folder, make_tokenizer
from safetensors.torch import load_file
from test_distributed import SCRIPT, accelerate_launch, assert_same_run
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import tjepa
from encoder_families import make_encoder
from helpers import arguments, run, run_elsewhere
from tjepa import TJEPAConfig, TJEPAForPreTraining
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.ema import EMACallback
from tjepa.training.model_folder import pretraining_folder, sentence_files
from tjepa.training.schedules import WarmupThenDecay, split_heads


PREDICTOR = "predictor_type=boundary,token_prediction_weight=1.0,denoising_weight=0.3"


def options(inputs: Path, output_dir: Path, encoder: Path | None, **overrides) -> list[str]:
    values = {"tokenizer_name": None, "config_overrides": PREDICTOR, "max_length": 60, "ema_momentum": 0.5}
    return arguments(inputs, output_dir, model_name_or_path=encoder, **{**values, **overrides})


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("encoders") / "bert")


@pytest.fixture(scope="module")
def finished(inputs, bert, tmp_path_factory) -> Path:
    """The folder of a run of ten steps, the first of which trains the heads alone; a checkpoint is at five."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, options(inputs, folder, bert, max_steps=10, save_steps=5))
    return folder


def test_the_folder_is_a_stock_folder(finished, bert, tmp_path):
    code = """
from transformers import AutoModel, AutoTokenizer
import torch
model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
assert type(model).__name__ == "BertModel" and type(model).__module__.startswith("transformers.")
states = model(**AutoTokenizer.from_pretrained(folder)("the fox", return_tensors="pt")).last_hidden_state
torch.save({"weights": model.state_dict(), "states": states.detach()}, "loaded.pt")
"""
    done = run_elsewhere(code, finished, tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.rglob("loaded.pt")
    loaded = torch.load(path)
    pretraining = TJEPAForPreTraining.from_pretrained(finished / "pretraining")
    for name, tensor in pretraining.target_encoder.state_dict().items():
        assert loaded["weights"][name].equal(tensor), name
    before = AutoModel.from_pretrained(bert)
    assert not loaded["weights"]["encoder.layer.0.output.dense.weight"].equal(
        before.encoder.layer[0].output.dense.weight
    )
    assert loaded["weights"]["pooler.dense.weight"].equal(before.pooler.dense.weight), "what does not train, stays"
    assert loaded["states"].shape == (1, 4, 32), "[CLS] the fox [SEP]"

    assert AutoTokenizer.from_pretrained(finished)("the fox").input_ids == make_tokenizer()("the fox").input_ids
    assert sentence_files(finished) == sentence_files(bert) and len(sentence_files(bert)) == 4
    assert all((finished / name).read_bytes() == (bert / name).read_bytes() for name in sentence_files(bert))
    config = json.loads((finished / "config.json").read_text())
    assert config["model_type"] == "bert" and config["architectures"] == ["BertModel"] and "auto_map" not in config
    assert not list(finished.glob("*.py")) and (finished / "pretraining" / "modeling_tjepa.py").is_file()
    card = (finished / "README.md").read_text()
    assert "trust_remote_code" not in card and "(bert)" in card and "# the target encoder" in card


def test_sentence_transformers_opens_it(finished, bert):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    texts = ["the fox sees a red hen", "night falls"]
    embeddings, before = (library.SentenceTransformer(str(folder)).encode(texts) for folder in (finished, bert))
    assert embeddings.shape == (2, 32) and (embeddings**2).sum(axis=1) == pytest.approx([1.0, 1.0], abs=1e-5)
    assert abs(embeddings - before).max() > 1e-6


def test_a_run_resumes_to_the_bit_and_goes_on_from_its_folder(inputs, finished, bert, tmp_path, monkeypatch, caplog):
    shutil.copytree(finished / "checkpoint-5", tmp_path / "out" / "checkpoint-5")
    run(
        monkeypatch,
        options(inputs, tmp_path / "out", bert, max_steps=10, save_steps=5, resume_from_checkpoint="last"),
    )
    for name in ("model.safetensors", "pretraining/model.safetensors"):
        weights, expected = load_file(tmp_path / "out" / name), load_file(finished / name)
        assert weights.keys() == expected.keys() and all(weights[key].equal(expected[key]) for key in weights), name

    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    rates = [line["learning_rate"] for line in history if "loss" in line]
    assert rates[0] == 0.0 and all(rate > 0 for rate in rates[1:]), "the heads alone, then both"

    run(monkeypatch, options(inputs, tmp_path / "more", finished / "pretraining", max_steps=2))
    history = json.loads((tmp_path / "more" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["learning_rate"] > 0, "the heads are not new"
    assert sentence_files(tmp_path / "more") == sentence_files(bert)
    assert "packed rows" in caplog.text


def test_evaluation_takes_the_trained_predictor(inputs, finished, tmp_path, monkeypatch):
    expected = json.loads((finished / "all_results.json").read_text())
    for folder, source in ((finished, None), (tmp_path / "elsewhere", finished)):
        run(monkeypatch, options(inputs, folder, source, do_train=False, eval_strategy="no", max_steps=10))
        results = json.loads((folder / "eval_results.json").read_text())
        assert results["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-6)
        assert results["train_steps"] == 10


def test_a_run_over_it_leaves_nothing_that_is_not_its_own(inputs, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "out")
    run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=1, overwrite_output_dir=True))
    assert sentence_files(tmp_path / "out") == [] and not (tmp_path / "out" / "pretraining").exists()
    for config in (None, {"model_type": "bert"}, {"model_type": "tjepa"}):  # a user's own, or another run's
        mine = tmp_path / "mine" / "pretraining"
        mine.mkdir(parents=True, exist_ok=True)
        (mine / "corpus.txt").write_text("mine")
        if config is not None:
            (mine / "config.json").write_text(json.dumps(config))
        run(monkeypatch, arguments(inputs, tmp_path / "mine", max_steps=1, overwrite_output_dir=True))
        assert (mine / "corpus.txt").exists() and pretraining_folder(str(tmp_path / "mine")) == str(tmp_path / "mine")


@pytest.mark.parametrize("model_type", ["deberta-v2", "modernbert"])
def test_from_scratch_and_padded(inputs, model_type, tmp_path, monkeypatch, caplog):
    """`--config_name` takes the architecture and, with it, the tokenizer; a row length and bfloat16 work, too."""
    folder = make_folder(tmp_path / "encoder", model_type)
    run(
        monkeypatch,
        options(
            inputs,
            tmp_path / "out",
            None,
            config_name=folder,
            encoder_input="padded",
            row_length=128,
            bf16=True,
            activation_checkpointing=True,
        ),
    )
    assert "padded rows" in caplog.text
    encoder = AutoModel.from_pretrained(tmp_path / "out")
    assert encoder.config.model_type == model_type and encoder.dtype == torch.float32
    args = torch.load(tmp_path / "out" / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert (args.learning_rate, args.head_learning_rate) == (1e-3, None), "from scratch the rates are the reference's"


def test_a_frozen_teacher_is_not_what_is_exported(inputs, bert, tmp_path, monkeypatch):
    for choice in (None, "target"):
        out = tmp_path / str(choice)
        run(monkeypatch, options(inputs, out, bert, ema_momentum=1, export_encoder=choice))
        before, after = load_file(bert / "model.safetensors"), load_file(out / "model.safetensors")
        pretraining = load_file(out / "pretraining" / "model.safetensors")
        assert all(pretraining[f"target_encoder.{name}"].equal(tensor) for name, tensor in before.items())
        assert all(after[name].equal(before[name]) for name in after) == (choice == "target")
        assert f"# the {choice or 'context'} encoder" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("model_type", "flags", "message"),
    [
        ("gpt2", {}, "GPT2Model does not look ahead"),
        ("fnet", {}, "FNetModel sees through its attention_mask: tokens that it hides change"),
        ("bert", {"max_length": 159}, "--max_length is 159, but a bert encoder of 160 .* 158 tokens at most"),
        ("roberta", {"max_length": 157}, "roberta encoder of 160 positions .* pass --max_length 156"),
        ("bert", {"tokenizer_name": "inputs"}, "The tokenizer has 300 tokens .* the embedding of .* 120"),
        ("bert", {"config_overrides": "target_layers=4"}, "target_layers must be between 1 and .* got 4"),
        ("bert", {"config_overrides": "hidden_size=64"}, "hidden_size belong to the bert encoder"),
        ("deberta", {"encoder_input": "packed"}, "DebertaModel cannot be fed packed rows"),
        ("bert", {"torch_compile": True}, "--torch_compile would compile a bert encoder anew for every batch"),
        ("bert", {"learning_rate": "-1e-3"}, "learning_rate must be above 0"),
        ("bert", {"heads_first_ratio": "1.0"}, "heads_first_ratio must be in"),
        (
            "bert",
            {"max_length": 64, "row_length": 64},
            "--row_length 64 is too short for .* 64 and 2 special tokens",
        ),
        ("bert", {"config_name": "other"}, "--config_name other is for training from scratch"),
    ],
)
def test_what_cannot_work_is_said_before_training(inputs, model_type, flags, message, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "encoder", model_type)
    if flags.get("tokenizer_name") == "inputs":
        flags = {"tokenizer_name": inputs / "tokenizer"}
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, options(inputs, tmp_path / "out", folder, **flags))


def test_a_tokenizer_whose_mask_is_the_encoders_padding_is_refused(inputs, tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "encoder", "roberta")
    settings = json.loads((folder / "config.json").read_text())
    settings["pad_token_id"] = AutoTokenizer.from_pretrained(folder).mask_token_id
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="mask token has the id .* which .* takes for padding"):
        run(monkeypatch, options(inputs, tmp_path / "out", folder))


@pytest.mark.parametrize(
    ("missing", "settings", "message"),
    [
        ("position_embeddings", {}, "no weights for 1 parameters of BertModel, such as embeddings.position_emb"),
        ("layer.1.output", {}, "do not fit the configuration.* encoder.layer.1.output.* is not there"),
        (None, {"num_hidden_layers": 1}, "do not fit the configuration.* encoder.layer.1.* is a layer too many there"),
        (None, {"intermediate_size": 48}, r"encoder.layer.0.intermediate.dense.bias is \[64\] there and \[48\] by"),
    ],
)
def test_weights_that_are_not_the_configurations_are_refused(
    missing, settings, message, inputs, bert, tmp_path, monkeypatch
):
    folder = tmp_path / "encoder"
    shutil.copytree(bert, folder)
    encoder = AutoModel.from_pretrained(folder)
    weights = {name: tensor for name, tensor in encoder.state_dict().items() if not missing or missing not in name}
    encoder.save_pretrained(folder, state_dict=weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, options(inputs, tmp_path / "out", folder))


def test_a_pooler_that_the_folder_lacks_is_not_saved_and_modules_come_from_a_checkpoint(
    inputs, bert, tmp_path, monkeypatch
):
    start, out = shutil.copytree(bert, tmp_path / "start"), tmp_path / "out"
    AutoModelForMaskedLM.from_pretrained(bert).save_pretrained(start)
    steps = {"max_steps": 2, "save_steps": 1}
    run(monkeypatch, options(inputs, out, start, **steps))
    shutil.rmtree(out / "checkpoint-2")
    run(monkeypatch, options(inputs, out, start, **steps, resume_from_checkpoint="last"))
    (out / "onnx").mkdir()
    (out / "onnx" / "model.onnx").write_text("of these weights")
    again = tmp_path / "again"
    run(monkeypatch, options(inputs, again, out / "checkpoint-1", max_steps=1))
    run(monkeypatch, options(inputs, out, out / "pretraining", max_steps=1, overwrite_output_dir=True))
    for folder in (out, again):
        info = AutoModel.from_pretrained(folder, output_loading_info=True)[1]
        assert set(info["missing_keys"]) == {"pooler.dense.weight", "pooler.dense.bias"}
        assert sentence_files(folder) == sentence_files(bert)
    assert not (out / "onnx" / "model.onnx").exists()


@pytest.mark.parametrize("name", ["pretraining", "checkpoint-5"])
def test_what_pretraining_goes_on_from_is_not_read_with(name, finished):
    with pytest.raises(ValueError, match=f"{name}: pretraining of a bert model goes on from there.*: {finished}"):
        tjepa.embed(finished / name, ["the fox"])


def test_without_a_mask_token_another_stands_in(inputs, tmp_path, monkeypatch, caplog):
    folder = make_folder(tmp_path / "encoder", "deberta-v2", mask_token=None, eos_token="[SEP]")
    run(monkeypatch, options(inputs, tmp_path / "out", folder, max_steps=1))
    assert "no mask token: [UNK] stands in hidden places" in caplog.text
    assert TJEPAConfig.from_pretrained(tmp_path / "out" / "pretraining").mask_token_id == 0


# --- Rates -----------------------------------------------------------------------------------------------------------


def test_rates_follow_what_starts_the_run(tmp_path):
    def settled(goes_on: bool, new_heads: bool, **given) -> tuple:
        args = PretrainingArguments(output_dir=str(tmp_path), **given)
        args.settle_rates(goes_on, new_heads)
        return args.learning_rate, args.head_learning_rate, args.heads_first_ratio, args.ema_momentum

    assert settled(False, False) == (1e-3, None, None, 0.996)
    assert settled(False, False, heads_first_ratio=0.5) == (1e-3, 1e-3, 0.5, 0.996)
    assert settled(True, True) == (1e-5, pytest.approx(1e-3), 0.1, None)
    assert settled(True, False) == (1e-5, pytest.approx(1e-3), 0.0, None)
    given = {"learning_rate": 1e-4, "head_learning_rate": 2e-4, "heads_first_ratio": 0.2, "ema_momentum": 0.9}
    assert settled(True, True, **given) == tuple(given.values())
    args = PretrainingArguments(output_dir=str(tmp_path))
    args.settle_rates(True, True)
    assert (args.start_lr, args.final_lr) == (pytest.approx(2e-6), pytest.approx(1e-8))
    args = PretrainingArguments(output_dir=str(tmp_path), start_lr=1e-4)
    with pytest.raises(ValueError, match="start_lr must be between 0 and the learning rate.*1e-04|0.0001 with"):
        args.settle_rates(True, True)


def test_heads_train_alone_and_then_the_encoder_warms_up():
    model = TJEPAForPreTraining.from_encoder(make_encoder("bert"))
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=1e-4)
    split_heads(optimizer, model.context_encoder, 1e-2)
    assert [group["is_head"] for group in optimizer.param_groups] == [False, False, True, True]
    assert [group["weight_decay"] for group in optimizer.param_groups][::2] == [0.1, 0.1]
    of_encoder = {id(p) for p in model.context_encoder.parameters() if p.requires_grad}
    assert {id(p) for group in optimizer.param_groups[:2] for p in group["params"]} == of_encoder
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(decayed) + len(others)

    schedule = WarmupThenDecay(optimizer, 40, 4, final_lr=1e-4, num_heads_first_steps=10)
    rates = []
    for _ in range(40):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    encoder_rates, head_rates = [rate[0] for rate in rates], [rate[2] for rate in rates]
    assert encoder_rates[:10] == [0.0] * 10 and head_rates[4:] == pytest.approx([1e-2] * 36)
    assert encoder_rates[10:15] == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5, 1e-4])
    assert encoder_rates[15:] == pytest.approx([1e-4] * 25)


def test_a_target_that_hardly_moves_is_said(inputs, bert, tmp_path, monkeypatch, caplog):
    flags = {"max_steps": 20, "save_steps": 20, "do_eval": False}
    for momentum in (0.9999, 1, None):
        caplog.clear()
        run(monkeypatch, options(inputs, tmp_path / str(momentum), bert, ema_momentum=momentum, **flags))
        warned = re.search(r"hardly moves in 20 steps: (\d+)% .* say to (0\.\d+), or freeze it", caplog.text)
        assert (warned is not None) == (momentum == 0.9999)
        history = json.loads((tmp_path / str(momentum) / "trainer_state.json").read_text())["log_history"]
        assert history[0]["ema_momentum"] == pytest.approx(0.9 if momentum is None else momentum)
        if warned:
            assert warned.groups() == ("100", "0.5")


def test_share_of_start():
    assert EMACallback(1.0, 1.0).share_of_start(50) == 1.0
    assert EMACallback(0.5, 0.5).share_of_start(3) == 0.125
    assert EMACallback(0.0, 1.0).share_of_start(3) == 0.0


# --- Two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("launcher", "encoder_input"), [("cpu.yaml", "padded"), ("fsdp2.yaml", "auto")])
def test_two_processes_are_one(inputs, bert, launcher, encoder_input, tmp_path, monkeypatch):
    predictor = PREDICTOR.partition(",denoising")[0]  # which draws anew in each process
    flags = {
        "config_overrides": predictor,
        "encoder_input": encoder_input,
        "max_steps": 4,
        "heads_first_ratio": 0.25,
        "learning_rate": "1e-3",
    }
    run(monkeypatch, options(inputs, tmp_path / "one", bert, per_device_train_batch_size=8, **flags))
    script = options(inputs, tmp_path / "two", bert, per_device_train_batch_size=4, **flags)
    accelerate_launch(launcher, [SCRIPT, *script], tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "two")


# --- What others do with the folder ----------------------------------------------------------------------------------


class LastHiddenState(torch.nn.Module):
    """The exporter that traces hands arguments by their place, which transformers does not take."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids, attention_mask):
        return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@pytest.mark.parametrize("is_dynamo", [True, False])
def test_onnx(finished, is_dynamo, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import onnxruntime

    encoder = AutoModel.from_pretrained(finished, attn_implementation="eager").eval()
    tokens = torch.arange(5, 25).view(2, 10) % 17
    dynamic = {0: "batch", 1: "length"}
    names = ["input_ids", "attention_mask"]
    shapes = {"dynamic_shapes" if is_dynamo else "dynamic_axes": dict.fromkeys(names, dynamic)}
    torch.onnx.export(
        LastHiddenState(encoder),
        (tokens, torch.ones_like(tokens)),
        str(tmp_path / "encoder.onnx"),
        input_names=names,
        output_names=["last_hidden_state"],
        dynamo=is_dynamo,
        **shapes,
    )
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    tokens, mask = torch.arange(3, 42).view(3, 13) % 17, torch.ones(3, 13, dtype=torch.long)
    mask[2, 8:] = 0
    states = session.run(["last_hidden_state"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})[0]
    with torch.no_grad():
        expected = encoder(tokens, attention_mask=mask)[0]
    torch.testing.assert_close(torch.from_numpy(states)[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_lora(finished):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    encoder = AutoModel.from_pretrained(finished)
    model = peft.get_peft_model(encoder, peft.LoraConfig(r=4, target_modules=["query", "value"]))
    loss = model(input_ids=torch.arange(5, 15)[None])[0].square().mean()
    loss.backward()
    assert all(p.grad.any() for name, p in model.named_parameters() if "lora_B" in name)
