"""Configurations and models as flags ask for them; every refusal names what does not fit, and its advice works."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    PreTrainedTokenizerFast,
    ViTConfig,
)

from helpers import TINY, WORDS, arguments, make_texts, make_tiny_config, run
from tjepa import (
    TJEPAConfig,
    TJEPAForMaskedLM,
    TJEPAForPreTraining,
    TJEPAForSequenceClassification,
    TJEPAModel,
    run_pretraining,
)
from tjepa.corpus.arguments import parse_arguments
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.run_pretraining import ModelArguments
from tjepa.training.loading import (
    apply_overrides,
    load_config,
    load_pretraining_config,
    load_pretraining_model,
    parse_config_overrides,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(make_texts(60), vocab_size=300, model_max_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> str:
    """What pretraining leaves: both encoders, predictor, token head, tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    config = make_tiny_config(vocab_size=300, max_position_embeddings=64, token_prediction_weight=1.0)
    model = TJEPAForPreTraining(config)
    with torch.no_grad():  # encoders that differ
        model.target_encoder.final_norm.weight.add_(1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_overrides_read_numbers_as_python_does():
    text = "a=1e-6,b=1e5,c=5e-2,d=8,e=True,f=false,g=None,h=null,i=gelu,j=-1.5,a=1_000"
    expected = {"a": 1000, "b": 1e5, "c": 0.05, "d": 8, "e": True, "f": False, "g": None, "h": None, "i": "gelu"}
    assert parse_config_overrides(text) == {**expected, "j": -1.5}
    assert parse_config_overrides(None) == parse_config_overrides("") == {}
    assert apply_overrides(TJEPAConfig(), parse_config_overrides("layer_norm_eps=1e-6")).layer_norm_eps == 1e-6
    for wrong in ("hidden_size", "hidden_size=1,=2"):
        with pytest.raises(ValueError, match="is a list such as"):
            parse_config_overrides(wrong)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("loss_type=huber", "'loss_type' expected one of"),
        ("target_layers=7", "target_layers must be between 1 and num_hidden_layers .2., got 7"),
        ("num_hidden_layers=1.5", "expected int, got float"),
        ("hiden_size=3", r"TJEPAConfig has no \['hiden_size'\]. Did you mean hidden_size"),
    ],
)
def test_overrides_of_a_loaded_configuration_are_checked_at_once(folder, overrides, message):
    for load in (lambda: load_config(folder, overrides), lambda: load_pretraining_config(folder, overrides=overrides)):
        with pytest.raises(ValueError, match=f"--config_overrides.*{message}"):
            load()


def test_an_impossible_configuration_is_told_from_a_missing_one(tmp_path):
    values = {**make_tiny_config().to_dict(), "hidden_size": 30}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"^--config_name \S+: hidden_size \(30\) must be a multiple"):
        load_pretraining_config(config_name=str(tmp_path))


def test_overrides_are_those_of_the_configuration_at_hand(tmp_path):
    DistilBertConfig(dim=32, n_heads=2, hidden_dim=64).save_pretrained(tmp_path)
    config = load_config(str(tmp_path), "attention_dropout=0.2,hidden_size=48")
    assert (type(config), config.attention_dropout, config.dim) == (DistilBertConfig, 0.2, 48)
    with pytest.raises(ValueError, match=r"DistilBertConfig has no \['loss_typ"):
        load_config(str(tmp_path), "loss_type=l1")


def test_derived_sizes_follow_an_override(tmp_path):
    TJEPAConfig(hidden_size=128, num_attention_heads=4, predictor_intermediate_size=100).save_pretrained(tmp_path)
    config = load_pretraining_config(config_name=str(tmp_path), overrides="hidden_size=64")
    assert (config.intermediate_size, config.rotary_dim, config.predictor_hidden_size) == (256, 16, 64)
    assert config.predictor_rotary_dim == 16 and config.predictor_intermediate_size == 100, "set apart: stays"
    with pytest.raises(ValueError, match="must be a multiple of"):
        load_pretraining_config(config_name=str(tmp_path), overrides="predictor_num_attention_heads=5")


def test_overrides_add_to_those_of_a_yaml_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("config_overrides: vocab_size=2048,hidden_size=128\n")
    for flag in (["--config_overrides=hidden_size=64"], ["--config-overrides", "hidden_size=64"]):
        (args,) = parse_arguments(ModelArguments, [str(path), *flag])
        assert parse_config_overrides(args.config_overrides) == {"vocab_size": 2048, "hidden_size": 64}
    (args,) = parse_arguments(ModelArguments, [str(path)])
    assert parse_config_overrides(args.config_overrides) == {"vocab_size": 2048, "hidden_size": 128}


def test_half_precision_is_continued_in_float32(folder, tokenizer, tmp_path):
    TJEPAForPreTraining.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    config = load_pretraining_config(str(tmp_path))
    model = load_pretraining_model(config, tokenizer, 64, model_name_or_path=str(tmp_path))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "float32"


def execute_python_command(message: str) -> None:
    code = re.search(r'python -c "(.*?)";', message)[1]
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("head", [TJEPAForSequenceClassification, TJEPAForMaskedLM])
def test_a_head_is_refused_and_the_advice_works(head, folder, tokenizer, tmp_path):
    source = tmp_path / "a head"
    model = head.from_pretrained(folder)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    with pytest.raises(ValueError, match="holds a head with its encoder") as error:
        TJEPAForPreTraining.from_pretrained(source)
    if head is TJEPAForMaskedLM:  # once is enough for what starts a process
        return
    execute_python_command(str(error.value))
    flags = shlex.split(str(error.value).split("then pretrain with ")[1].removesuffix("."))
    assert flags == ["--model_name_or_path", f"{source}-encoder", "--tokenizer_name", str(source)]
    config = load_pretraining_config(flags[1])
    pretraining = load_pretraining_model(
        config, AutoTokenizer.from_pretrained(flags[3]), 64, model_name_or_path=flags[1]
    )
    for encoder in (pretraining.context_encoder, pretraining.target_encoder):
        for name, tensor in model.encoder.state_dict().items():
            assert tensor.equal(encoder.state_dict()[name])


def test_other_models_and_empty_ones_are_refused(tmp_path):
    bert = tmp_path / "bert"
    BertModel(
        BertConfig(vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(bert)
    for model_class in (TJEPAForPreTraining, TJEPAModel, TJEPAForSequenceClassification):
        with pytest.raises(ValueError, match="holds a bert model, and .* loads T-JEPA models only"):
            model_class.from_pretrained(bert)
    ViTConfig(hidden_size=8).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="--model_name_or_path .*vit is a vit model, which is not a text encoder"):
        load_pretraining_config(str(tmp_path / "vit"))
    assert isinstance(AutoModel.from_pretrained(bert), BertModel), "the way that the message names"

    ours = tmp_path / "ours"
    make_tiny_config().save_pretrained(ours)
    (ours / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    for model_class in (TJEPAForPreTraining, TJEPAModel, TJEPAForSequenceClassification):
        with pytest.raises(ValueError, match="has no(ne of the)? weights"):
            model_class.from_pretrained(ours)
    (ours / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no model that names its type"):
        TJEPAModel.from_pretrained(ours)


def test_missing_folders_are_named(folder, tmp_path):
    near = str(folder)[:-1]
    for load, flag in (
        (lambda name: load_pretraining_config(name), "--model_name_or_path"),
        (lambda name: load_pretraining_config(config_name=name), "--config_name"),
    ):
        with pytest.raises(FileNotFoundError, match=rf"{flag} {near}: there is no such .*Did you mean {folder}\?"):
            load(near)
        with pytest.raises(ValueError, match=f"{flag} {tmp_path} is not the folder of a model"):
            load(str(tmp_path))
        with pytest.raises(ValueError, match=f"{flag} no/such: no model could be found there"):
            load("no/such")


def test_sizes_that_do_not_fit_are_named(folder, tokenizer):
    for overrides, message in (
        ("vocab_size=310", r"token_embedding.weight is \[300, 32\] there and \[310, 32\] by the configuration"),
        ("hidden_size=64", r"is \[.*32.*\] there and \[.*64.*\] by"),
        ("num_hidden_layers=1", "encoder.layers.1.* is a layer too many there"),
        ("num_hidden_layers=3", "encoder.layers.2.* is not there"),
        ("predictor_num_hidden_layers=3", "predictor.layers.2.* is not there"),
    ):
        config = load_pretraining_config(folder, overrides=overrides)
        with pytest.raises(ValueError, match=f"{message}.*--config_overrides is {overrides}"):
            load_pretraining_model(config, tokenizer, 64, overrides, folder)
    overrides = "predictor_type=boundary,token_prediction_weight=0.0"  # another predictor is a new one, and may be
    load_pretraining_model(load_pretraining_config(folder, overrides=overrides), tokenizer, 64, overrides, folder)


def test_tokens_added_for_a_domain_grow_both_encoders_and_the_token_head(folder, tokenizer, tmp_path, caplog):
    larger = AutoTokenizer.from_pretrained(folder)
    larger.add_tokens(["<gene>", "<protein>"])
    old = TJEPAForPreTraining.from_pretrained(folder)
    model = load_pretraining_model(load_pretraining_config(folder), larger, 64, model_name_or_path=folder)
    assert "grow from 300 to 302 rows" in caplog.text
    for part in ("context_encoder", "target_encoder"):
        embedding = getattr(model, part).token_embedding.weight
        assert embedding.shape == (302, 32) and embedding[:300].equal(getattr(old, part).token_embedding.weight)
    assert model.target_encoder.token_embedding.weight[300:].equal(model.context_encoder.token_embedding.weight[300:])
    assert len(model.token_head.bias) == 302
    assert [p.requires_grad for n, p in model.named_parameters() if n.startswith("target")].count(True) == 0
    model.save_pretrained(tmp_path)
    assert len(AutoModel.from_pretrained(tmp_path).token_embedding.weight) == 302
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 302


def test_another_tokenizer_is_refused_and_the_advice_works(folder, inputs, tmp_path, monkeypatch):
    other = train_tokenizer(make_texts(60, seed=1), vocab_size=310, model_max_length=64)
    backend = json.loads(other.backend_tokenizer.to_str())
    first, second = list(backend["model"]["vocab"])[-2:]
    vocabulary = backend["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend))).save_pretrained(
        tmp_path / "other"
    )
    given = {"model_name_or_path": folder, "tokenizer_name": tmp_path / "other", "config_overrides": None}
    with pytest.raises(ValueError, match="was trained with another tokenizer") as error:
        run(monkeypatch, arguments(inputs, tmp_path / "out", max_steps=1, **given))
    advice = re.search(r"scratch with (.*) in place of", str(error.value))[1].split()
    given = {"tokenizer_name": tmp_path / "other", "config_overrides": None, "max_steps": 1}
    run(monkeypatch, [*advice, *arguments(inputs, tmp_path / "out", **given)])


def test_a_checkpoint_goes_on_as_the_model_that_it_is_of(inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, arguments(inputs, out, max_steps=2, save_steps=1))
    shutil.rmtree(out / "checkpoint-2")
    for change in ("num_attention_heads=4", "predictor_type=boundary", "loss_type=cosine"):
        overrides = {"config_overrides": f"{TINY},{change}", "resume_from_checkpoint": "last", "max_steps": 2}
        with pytest.raises(ValueError, match=f"was made with {change.split('=')[0]}="):
            run(monkeypatch, arguments(inputs, out, **overrides))
    train_tokenizer(make_texts(60, seed=1), vocab_size=300, model_max_length=64).save_pretrained(tmp_path / "other")
    given = {"tokenizer_name": tmp_path / "other", "resume_from_checkpoint": "last", "max_steps": 2}
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        run(monkeypatch, arguments(inputs, out, **given))
    with pytest.raises(ValueError, match="is the folder of a run: name one of its checkpoints"):
        run(monkeypatch, arguments(inputs, out, resume_from_checkpoint=out))
    run(monkeypatch, arguments(inputs, out, resume_from_checkpoint="last", max_steps=2))


@pytest.mark.parametrize("flags", [{"max_steps": 0}, {"max_steps": -1, "num_train_epochs": 0}])
def test_a_run_without_a_step_is_refused(inputs, tmp_path, monkeypatch, flags):
    with pytest.raises(ValueError, match="make a run without a step"):
        run(monkeypatch, arguments(inputs, tmp_path / "out", **flags))


def test_a_vocabulary_with_gaps_and_one_too_large(inputs, tmp_path, monkeypatch):
    words = {"[UNK]": 0, **{word: index * 9 for index, word in enumerate(WORDS, start=1)}}
    gaps = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")), unk_token="[UNK]"
    )
    assert len(gaps) < max(words.values())
    model = load_pretraining_model(load_pretraining_config(overrides="hidden_size=48,num_hidden_layers=1"), gaps, 64)
    assert model.config.vocab_size == max(words.values()) + 1
    model.context_encoder(input_ids=torch.tensor([[max(words.values())]]))

    make_tiny_config(vocab_size=50).save_pretrained(tmp_path)
    config = load_pretraining_config(config_name=str(tmp_path))
    with pytest.raises(ValueError, match=r"pass (--config_overrides vocab_size=109)") as error:
        load_pretraining_model(config, gaps, 64)
    advice = re.search(r"--config_overrides (\S+),", str(error.value))[1]
    config = load_pretraining_config(config_name=str(tmp_path), overrides=advice)
    assert load_pretraining_model(config, gaps, 64, advice).config.vocab_size == 109


def test_folder_states_the_length_that_was_trained(folder, inputs, tmp_path, monkeypatch):
    options = {"model_name_or_path": folder, "tokenizer_name": None, "config_overrides": None, "max_steps": 1}
    for max_length, stated in ((128, 128), (32, 64)):  # the weights were trained on 64 before
        run(monkeypatch, arguments(inputs, tmp_path / f"{max_length}", max_length=max_length, **options))
        config = json.loads((tmp_path / f"{max_length}" / "config.json").read_text())
        assert config["max_position_embeddings"] == stated
        assert AutoTokenizer.from_pretrained(tmp_path / f"{max_length}").model_max_length == stated


def test_pretraining_saves_a_tokenizer_that_adds_nothing(shared_folder, inputs, tmp_path, monkeypatch):
    run(
        monkeypatch,
        arguments(inputs, tmp_path, max_steps=1, tokenizer_name=shared_folder / "tokenizers" / "bert-base-uncased"),
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("The fox")["input_ids"] == tokenizer("The fox", add_special_tokens=False)["input_ids"]
    assert tokenizer.mask_token_id in tokenizer("the [MASK]")["input_ids"]


def test_a_mistaken_override_is_found_before_any_data_is_read(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_pretraining, "load_documents", lambda *args: pytest.fail("data was read"))
    with pytest.raises(ValueError, match="Did you mean hidden_size"):
        run(monkeypatch, arguments(inputs, tmp_path / "out", config_overrides="hiden_size=64"))
