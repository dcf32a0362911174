"""What servers expect of a folder, from their documentation and sources: config keys, module files, an ONNX graph."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from encoder_folders import make_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModel, AutoTokenizer

import tjepa
from helpers import REPOSITORY, arguments, make_texts, run
from tjepa.layers_tjepa import TJEPAAttention
from tjepa.tools import export_sentence_transformer
from tjepa.tools.export_sentence_transformer import SentenceGraph, export_onnx
from tjepa.training.model_folder import ONNX_FILES


TEXTS = ["the fox", "night falls on a red hen", "before the fox runs home"]
MODULES = "sentence_transformers.models."


@pytest.fixture(scope="module")
def ours(inputs, tmp_path_factory):
    """`tjepa export FOLDER OUTPUT --onnx`, with a whitening."""
    pytest.importorskip("onnxscript", reason="onnx is not installed")
    folder = tmp_path_factory.mktemp("exported")
    (folder / "texts.txt").write_text("\n".join(make_texts(400)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        run(monkeypatch, arguments(inputs, folder / "run", max_steps=1, save_strategy="no", do_eval=False))
        flags = [str(folder / "run"), str(folder / "out"), "--onnx", "--whitening_file", str(folder / "texts.txt")]
        monkeypatch.setattr(sys, "argv", ["tjepa export", *flags])
        export_sentence_transformer.main()
    return folder / "out"


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What `tjepa adapt` leaves of a BERT that came as a model of sentence-transformers."""
    return make_folder(tmp_path_factory.mktemp("stock") / "bert")


@pytest.fixture(params=["ours", "stock"])
def folder(request):
    return request.getfixturevalue(request.param)


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_text_embeddings_inference(folder):
    """router/src/lib.rs: `ModelConfig`, `PoolConfig`, `STConfig`; fast tokenizers only. docs: supported_models.md."""
    config = read(folder, "config.json")
    assert isinstance(config["architectures"], list) and isinstance(config["max_position_embeddings"], int)
    assert isinstance(config.get("pad_token_id", 0), int)  # null does not parse
    pooling = read(folder, "1_Pooling/config.json")
    assert pooling["pooling_mode_mean_tokens"] is True and not pooling["pooling_mode_cls_token"]
    assert read(folder, "sentence_bert_config.json")["max_seq_length"] == 64
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXTS[0]).ids
    assert (folder / "model.safetensors").is_file()


def test_text_embeddings_inference_takes_our_architecture_as_a_graph(ours):
    """backends/ort/src/lib.rs: `onnx/model.onnx`; an output `sentence_embedding` is used as it is."""
    from onnxruntime import InferenceSession

    config = read(ours, "config.json")
    assert isinstance(config["hidden_size"], int) and isinstance(config["num_hidden_layers"], int)
    session = InferenceSession(ours / ONNX_FILES[0])
    assert {node.name for node in session.get_inputs()} == {"input_ids", "attention_mask"}
    assert "sentence_embedding" in {node.name for node in session.get_outputs()}
    check_graph(ours, session)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onnx_runtime_on_a_stock_encoder(stock, tmp_path, dtype):
    from onnxruntime import InferenceSession

    shutil.copytree(stock, tmp_path / "stock")
    AutoModel.from_pretrained(stock, dtype=dtype).save_pretrained(tmp_path / "stock")
    encoder = AutoModel.from_pretrained(tmp_path / "stock", attn_implementation="eager")
    export_onnx(encoder, tmp_path / "model.onnx", tmp_path / "stock")
    assert encoder.dtype == dtype
    encoder.float().save_pretrained(tmp_path / "stock")  # to compare with, the same rounded weights
    check_graph(tmp_path / "stock", InferenceSession(tmp_path / "model.onnx"))


def check_graph(folder, session):
    """The vectors of the graph are those of `tjepa.embed` and of sentence-transformers."""
    tokens = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="np")
    names = [node.name for node in session.get_inputs()]
    (vectors,) = session.run(["sentence_embedding"], {name: tokens[name] for name in names})
    np.testing.assert_allclose(vectors, tjepa.embed(folder, TEXTS).numpy(), atol=1e-5)
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    expected = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_an_empty_text_is_no_nan_in_the_graph(ours):
    graph = SentenceGraph(AutoModel.from_pretrained(ours), "mean", [])
    ids = torch.tensor([[1, 2], [0, 0]])
    vectors = graph(ids, torch.tensor([[1, 1], [0, 0]]))[1]
    assert vectors[0].isfinite().all() and vectors[1].eq(0).all()


def test_vllm_finds_pooling_projection_and_length(folder):
    """vllm: transformers_utils/config.py `get_pooling_config`; models/adapters.py `_load_st_projector`."""
    modules = read(folder, "modules.json")
    kinds = [module["type"].removeprefix(MODULES) for module in modules]
    assert kinds in (["Transformer", "Pooling", "Dense", "Normalize"], ["Transformer", "Pooling", "Normalize"])
    pooling = read(folder, modules[1]["path"] + "/config.json")
    assert [name for name, value in pooling.items() if value is True][0] == "pooling_mode_mean_tokens"
    assert {"max_seq_length", "do_lower_case"} <= set(read(folder, "sentence_bert_config.json"))
    if "Dense" in kinds:
        dense = read(folder, "2_Dense/config.json")
        assert dense["activation_function"] == f"{nn.Identity.__module__}.Identity"
        weights = load_file(folder / "2_Dense" / "model.safetensors")
        assert weights["linear.weight"].shape == (dense["out_features"], dense["in_features"]) and dense["bias"]
        assert weights["linear.bias"].shape == (dense["out_features"],)


def test_vllm_can_run_our_architecture(ours):
    """docs: "Writing custom models" for the Transformers modeling backend."""
    assert read(ours, "config.json")["auto_map"]["AutoModel"] == "modeling_tjepa.TJEPAModel"
    model = AutoModel.from_pretrained(ours)
    assert model._supports_attention_backend and model.is_backend_compatible()
    attentions = [module for module in model.modules() if isinstance(module, TJEPAAttention)]
    assert attentions and all(module.is_causal is False for module in attentions)
    assert "ALL_ATTENTION_FUNCTIONS" in (REPOSITORY / "layers_tjepa.py").read_text()

    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append(kwargs)
        return query.transpose(1, 2), None

    from transformers import AttentionInterface

    AttentionInterface.register("spy", spy)
    model.set_attn_implementation("spy")
    model(input_ids=torch.tensor([[3, 4, 5]]), attention_instances="of vLLM")  # passed down to the attention
    assert len(seen) == len(attentions) and all(kwargs["attention_instances"] == "of vLLM" for kwargs in seen)
