"""Neighbouring libraries on our folders: pipelines, sentence-transformers, peft, torch.export, ONNX, torch.compile."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from helpers import make_tiny_config, make_word_tokenizer, with_target_of_its_own
from tjepa import TJEPAForMaskedLM, TJEPAForPreTraining, TJEPAForSequenceClassification, TJEPAModel
from tjepa.corpus.train_tokenizer import train_tokenizer
from tjepa.downstream.embedding import embed_texts
from tjepa.tools.export_sentence_transformer import export_sentence_transformer


WORDS = [f"word{i}" for i in range(50)]
TEXTS = [" ".join(WORDS[i : i + length]) for i, length in enumerate((3, 1, 20, 7, 12, 40))]
MAX_LENGTH = 16
TRUNCATION = {"text-classification": {"truncation": True}, "token-classification": {}}  # the latter always truncates


@pytest.fixture(scope="module")
def tokenizer():
    """A token per word. It adds [CLS] and [SEP], as BERT's does, and has no token to pad with."""
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return make_word_tokenizer([*special.values(), *WORDS], model_max_length=MAX_LENGTH, **special)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A pretraining folder with its tokenizer; its two encoders differ."""
    torch.manual_seed(0)
    model = with_target_of_its_own(TJEPAForPreTraining(make_tiny_config(max_position_embeddings=MAX_LENGTH)))
    folder = tmp_path_factory.mktemp("neighbours") / "pretraining"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=tolerance, atol=tolerance)


def make_inputs(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Every row but the first is padded, the last to one token."""
    torch.manual_seed(length)
    mask = torch.ones(batch_size, length, dtype=torch.long)
    for row, num_tokens in enumerate(torch.linspace(length, 1, batch_size).long().tolist()):
        mask[row, num_tokens:] = 0
    return {"input_ids": torch.randint(60, (batch_size, length)), "attention_mask": mask}


# --- Pipelines -------------------------------------------------------------------------------------------------------


def test_feature_extraction_pipeline(folder, tokenizer):
    extract = pipeline("feature-extraction", str(folder))
    encoder = AutoModel.from_pretrained(folder).eval()
    assert type(extract.model) is TJEPAModel
    for text, features in zip(TEXTS[:3], extract(TEXTS[:3], truncation=True), strict=True):
        inputs = tokenizer(text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            close(features, encoder(**inputs).last_hidden_state)


@pytest.mark.parametrize(
    ("task", "auto_class"),
    [
        ("text-classification", AutoModelForSequenceClassification),
        ("token-classification", AutoModelForTokenClassification),
    ],
)
def test_classification_pipelines(folder, tokenizer, tmp_path, task, auto_class):
    names = ["dull", "fine"]
    model = auto_class.from_pretrained(folder, id2label=dict(enumerate(names)), label2id={"dull": 0, "fine": 1}).eval()
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast.from_pretrained(folder, pad_token="[SEP]").save_pretrained(tmp_path)
    one_by_one, in_batches = pipeline(task, str(tmp_path)), pipeline(task, str(tmp_path), batch_size=2)
    for text, batched in zip(TEXTS[:4], in_batches(TEXTS[:4], **TRUNCATION[task]), strict=True):
        with torch.no_grad():
            inputs = tokenizer(text, truncation=True, return_tensors="pt")
            scores, labels = model(**inputs).logits.softmax(-1).max(-1)
        alone = one_by_one(text, **TRUNCATION[task])
        if task == "text-classification":
            batched = [batched]
        else:  # without [CLS] and [SEP]
            scores, labels = scores[0, 1:-1], labels[0, 1:-1]
            assert [row["word"] for row in alone] == text.split()[: MAX_LENGTH - 2]
        for predictions in (alone, batched):
            assert [row.get("label", row.get("entity")) for row in predictions] == [names[i] for i in labels]
            close([row["score"] for row in predictions], scores)


@pytest.mark.parametrize("pooling", ["mean", "first", "attention"])
def test_an_empty_text_is_classified_and_read(tmp_path, pooling):
    """Nothing is added to a text, so an empty one has no token: no crash, alone, in a batch, or in a list."""
    tokenizer = train_tokenizer(["the fox sees a hen"] * 20, vocab_size=300, model_max_length=MAX_LENGTH)
    config = make_tiny_config(vocab_size=300, pad_token_id=tokenizer.pad_token_id, classifier_pooling=pooling)
    TJEPAForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify, extract = (pipeline(task, str(tmp_path)) for task in ("text-classification", "feature-extraction"))
    alone = classify([""])[0]
    assert 0.5 <= alone["score"] <= 1 and alone == classify(["", "a fox"])[0]
    if pooling != "first":  # whose first token is padding in a batch
        assert pipeline("text-classification", str(tmp_path), batch_size=2)(["", "a fox"])[0] == alone
    assert extract("") == [[]]


# --- sentence-transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("encoder", "normalize"), [("target", True), ("context", False)])
def test_sentence_transformer_is_the_mean_over_the_tokens(folder, tokenizer, tmp_path, encoder, normalize):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    export_sentence_transformer(folder, tmp_path / "exported", encoder=encoder, normalize=normalize)
    expected = embed_texts(AutoModel.from_pretrained(folder, encoder=encoder), tokenizer, TEXTS, MAX_LENGTH)
    expected = F.normalize(expected) if normalize else expected
    model = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")  # tjepa is imported: no remote code
    assert model.max_seq_length == MAX_LENGTH and model.get_embedding_dimension() == 32
    close(model.encode(TEXTS, batch_size=4), expected)
    similarity = F.cosine_similarity(expected[:1], expected)
    close(model.similarity(model.encode(TEXTS[:1]), model.encode(TEXTS))[0], similarity)


def test_sentence_transformer_reads_empty_texts_and_special_tokens_as_text(tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    tokenizer = train_tokenizer(["the fox sees a hen"] * 20, vocab_size=300, model_max_length=MAX_LENGTH)
    encoder = TJEPAModel(make_tiny_config(vocab_size=300, max_position_embeddings=MAX_LENGTH))
    encoder.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    export_sentence_transformer(tmp_path / "encoder", tmp_path / "exported")
    model = library.SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    for texts in ([""], ["", ""], ["", "a fox"]):
        assert not model.encode(texts)[0].any()
    literal = "a </s> and a <mask>"
    close(model.encode([literal]), F.normalize(embed_texts(encoder, tokenizer, [literal], MAX_LENGTH)))
    assert tokenizer.eos_token_id in tokenizer(literal)["input_ids"]
    assert tokenizer.eos_token_id not in model.tokenizer(literal)["input_ids"]


def test_sentence_transformer_in_a_clean_process(folder, tokenizer, tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    code = """
import json, sys
sys.modules["tjepa"] = None
from sentence_transformers import SentenceTransformer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
try:
    SentenceTransformer(folder, device="cpu")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("ran the code in the folder without being told to")
model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
print(json.dumps(model.encode(texts).tolist()))
"""
    export_sentence_transformer(folder, tmp_path / "exported")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    (tmp_path / "elsewhere").mkdir()
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "exported"), json.dumps(TEXTS)],
        cwd=tmp_path / "elsewhere",
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    expected = embed_texts(AutoModel.from_pretrained(folder), tokenizer, TEXTS, MAX_LENGTH)
    close(json.loads(result.stdout.splitlines()[-1]), F.normalize(expected))


def test_export_names_a_missing_folder_and_its_neighbour(folder, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"{folder}x: there is no such file or folder. Did you mean {folder}\?"
    ):
        export_sentence_transformer(f"{folder}x", tmp_path / "out")


def test_export_refuses_what_it_can_not_do(folder, tokenizer, tmp_path):
    with pytest.raises(FileExistsError, match="choose another one, or empty it"):
        export_sentence_transformer(folder, folder)
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="is a bert model; only T-JEPA"):
        export_sentence_transformer(tmp_path / "bert", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


# --- LoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task_type", "auto_class", "target_modules"),
    [
        ("SEQ_CLS", AutoModelForSequenceClassification, "all-linear"),
        ("TOKEN_CLS", AutoModelForTokenClassification, ["qkv_proj", "out_proj"]),
    ],
)
def test_lora_trains_saves_and_loads(folder, tmp_path, task_type, auto_class, target_modules):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = auto_class.from_pretrained(folder, num_labels=3)
    encoder_before = {name: tensor.clone() for name, tensor in base.encoder.state_dict().items()}
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type=task_type, r=4, target_modules=target_modules))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapted = {name.split(".lora_")[0].split(".")[-1] for name in trained if ".lora_" in name}
    everything = {"qkv_proj", "out_proj", "up_proj", "down_proj"}
    assert adapted == (everything if target_modules == "all-linear" else set(target_modules))
    assert all(".lora_" in name or ".classifier." in name for name in trained)

    inputs = make_inputs(4, 9)
    labels = torch.tensor([0, 1, 2, 1]) if task_type == "SEQ_CLS" else inputs["input_ids"] % 3
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path / "adapter")
    own_class = type(base).from_pretrained(tmp_path / "adapter", num_labels=3)  # loads the base model, too
    assert any(".lora_" in name for name, _ in own_class.named_parameters())
    assert sum(file.stat().st_size for file in (tmp_path / "adapter").glob("*.safetensors")) < 50_000  # not the model
    torch.manual_seed(1)  # another head, which the adapter's replaces
    again = peft.PeftModel.from_pretrained(auto_class.from_pretrained(folder, num_labels=3), tmp_path / "adapter")
    model.eval(), again.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
        close(again(**inputs).logits, logits, 1e-6)
        close(again.merge_and_unload()(**inputs).logits, logits)
        model.unload()
    assert all(model.base_model.model.encoder.state_dict()[name].equal(t) for name, t in encoder_before.items())


# --- Export and compilation ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(folder):
    return AutoModel.from_pretrained(folder).eval()


OTHER_SHAPES = [(3, 19), (1, 5), (2, 1)]


def test_torch_export_with_dynamic_batch_and_length(encoder):
    dynamic = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    inputs = make_inputs(2, 7)
    program = torch.export.export(encoder, (), inputs, dynamic_shapes=dict.fromkeys(inputs, dynamic)).module()
    for shape in OTHER_SHAPES:
        inputs = make_inputs(*shape)
        with torch.no_grad():
            actual, expected = program(**inputs).last_hidden_state, encoder(**inputs).last_hidden_state
        is_token = inputs["attention_mask"].bool()
        close(actual[is_token], expected[is_token])


def test_onnx_export_with_dynamic_batch_and_length(encoder, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    import onnxruntime

    dynamic = {0: "batch", 1: "length"}
    inputs = make_inputs(2, 7)
    torch.onnx.export(
        encoder,
        (),
        tmp_path / "encoder.onnx",
        kwargs=inputs,
        dynamo=True,
        dynamic_shapes=dict.fromkeys(inputs, dynamic),
        input_names=list(inputs),
        output_names=["last_hidden_state"],
    )
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    assert [node.shape for node in session.get_inputs()] == [["batch", "length"]] * 2
    for shape in OTHER_SHAPES:
        inputs = make_inputs(*shape)
        (actual,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            expected = encoder(**inputs).last_hidden_state
        is_token = inputs["attention_mask"].bool()
        close(torch.from_numpy(actual)[is_token], expected[is_token])


@pytest.mark.parametrize("model_class", [TJEPAModel, TJEPAForSequenceClassification, TJEPAForMaskedLM])
def test_compiled_as_one_graph_and_once_for_all_lengths(folder, model_class):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = model_class.from_pretrained(folder)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch_size, length in [(2, 7), (3, 8), (4, 19), (5, 12)]:
        inputs = make_inputs(batch_size, length)
        gradients = []
        for run in (compiled, model):
            model.zero_grad()
            output = run(**inputs)[0]
            is_token = inputs["attention_mask"].bool() if output.shape[:2] == (batch_size, length) else slice(None)
            output[is_token].square().sum().backward()
            gradients.append((output[is_token].detach(), model.get_input_embeddings().weight.grad.clone()))
        for actual, expected in zip(*gradients, strict=True):
            close(actual, expected, 5e-4)  # of states of size 100
    assert backend.frame_count <= 2  # the first shape, then any shape
