"""A folder that lacks weights of its encoder is refused by all that reads with it: vectors of random layers look like
any others."""

import json
import shutil

import pytest
from encoder_folders import make_folder
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, T5EncoderModel

import tjepa
from finetuning_helpers import arguments, run
from helpers import make_tiny_config
from tjepa import TJEPAForPreTraining
from tjepa.downstream.probe import EmbeddingLayer
from tjepa.tools.export_sentence_transformer import export_sentence_transformer
from tjepa.tools.fill import load_for_filling
from tjepa.training.loading import load_config, load_encoder, load_pretraining_config, load_pretraining_model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("encoders") / "bert")


DAMAGES = {
    "other names": (lambda name: f"module.{name}", {}, "has no weights for 53 parameters of BertModel"),
    "no positions": (lambda name: name.replace("position_emb", "x"), {}, "for 1 parameters .*position_emb"),
    "a layer less": (str, {"num_hidden_layers": 4}, "encoder.layer.3.* is not there"),
    "a layer more": (str, {"num_hidden_layers": 1}, "encoder.layer.1.* is a layer too many"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("has_head", [False, True])
def test_weights_that_are_missing_are_refused(damage, has_head, bert, folder, tmp_path, monkeypatch):
    rename, settings, message = DAMAGES[damage]
    shutil.copytree(bert, tmp_path / "bert")
    if has_head:
        AutoModelForSequenceClassification.from_pretrained(bert).save_pretrained(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    weights = {rename(name): tensor for name, tensor in weights.items()}
    save_file(weights, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=message):
        tjepa.embed(tmp_path / "bert", ["the fox"])
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, arguments(folder, tmp_path / "out", model_name_or_path=tmp_path / "bert", max_steps=1))


@pytest.mark.parametrize("lost", ["target_encoder.layers.0.mlp.up_proj.weight", "target_encoder.final_norm.bias"])
def test_a_run_that_lacks_weights_is_refused(lost, folder, tmp_path):
    shutil.copytree(folder / "pretraining", tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    del weights[lost]
    save_file(weights, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    name = str(tmp_path / "run")
    with pytest.raises(ValueError, match=lost.removeprefix("target_encoder.")):
        tjepa.embed(name, ["the fox"])
    with pytest.raises(ValueError, match=lost.removeprefix("target_encoder.")):
        export_sentence_transformer(name, tmp_path / "out", whitening_texts=None)
    with pytest.raises(ValueError, match=f"{lost} is not there"):
        load_for_filling(name)
    config, tokenizer = load_pretraining_config(name), AutoTokenizer.from_pretrained(name)
    with pytest.raises(ValueError, match=f"{lost} is not there"):
        load_pretraining_model(config, tokenizer, 16, model_name_or_path=name)


def test_a_token_head_of_another_size_is_refused(folder, tmp_path):
    model = TJEPAForPreTraining(make_tiny_config(token_prediction_weight=1.0))
    model.save_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(folder / "pretraining").save_pretrained(tmp_path / "run")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    name = next(name for name in weights if name.startswith("token_head.") and weights[name].dim() == 2)
    save_file({**weights, name: weights[name].repeat(2, 1)}, tmp_path / "run" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is .* there and .* by the configuration"):
        load_for_filling(str(tmp_path / "run"))


def test_a_pooler_may_be_missing(bert, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    encoder = AutoModel.from_pretrained(bert, add_pooling_layer=False)
    encoder.save_pretrained(tmp_path / "bert")
    assert tjepa.embed(tmp_path / "bert", ["the fox"]).equal(tjepa.embed(bert, ["the fox"]))


def test_of_t5_the_encoder_alone_is_read_with(folder, tmp_path, monkeypatch):
    t5 = make_folder(tmp_path / "t5", "t5")
    encoder = load_encoder(load_config(str(t5)), str(t5))
    assert isinstance(encoder, T5EncoderModel) and tjepa.embed(t5, ["the fox"]).shape == (1, 32)
    with pytest.raises(ValueError, match="T5ForSequenceClassification reads with a decoder, which .*t5, an"):
        run(monkeypatch, arguments(folder, tmp_path / "out", model_name_or_path=t5, max_steps=1))


def test_an_embedding_may_give_its_scale_too(tmp_path):
    ibert = load_encoder(load_config(str(folder := make_folder(tmp_path / "ibert", "ibert"))), str(folder))
    ids = ibert.dummy_inputs["input_ids"] % 40
    assert EmbeddingLayer(ibert)(ids).last_hidden_state.shape == (*ids.shape, 32)
