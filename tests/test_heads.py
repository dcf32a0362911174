"""The downstream heads: which weights they get from which folder, pooling, losses, and transformers' conventions."""

import math
import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from helpers import make_tiny_config
from tjepa import (
    TJEPAForMaskedLM,
    TJEPAForPreTraining,
    TJEPAForQuestionAnswering,
    TJEPAForSequenceClassification,
    TJEPAForTokenClassification,
    TJEPAModel,
)
from tjepa.modeling_tjepa import TJEPAPooling


HEADS = {
    AutoModelForSequenceClassification: TJEPAForSequenceClassification,
    AutoModelForTokenClassification: TJEPAForTokenClassification,
    AutoModelForQuestionAnswering: TJEPAForQuestionAnswering,
    AutoModelForMaskedLM: TJEPAForMaskedLM,
}
HEAD_PARAMETERS = ("classifier.", "qa_outputs.", "token_head.", "decoder.")
INPUT_IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
ATTENTION_MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture
def folder(make_model, tmp_path):
    """A pretraining folder whose context and target encoder differ."""
    make_model().save_pretrained(tmp_path / "pretraining")
    return tmp_path / "pretraining"


def assert_holds(module, folder, prefix):
    weights = load_file(folder / "model.safetensors")
    expected = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    state = module.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].equal(tensor) for name, tensor in expected.items())


# --- Which weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["target", "context"])
@pytest.mark.parametrize("auto_class", HEADS)
def test_from_a_pretraining_folder_and_saved_and_loaded_again(folder, tmp_path, auto_class, encoder):
    asked = {} if encoder == "target" else {"encoder": "context"}
    model, info = auto_class.from_pretrained(folder, output_loading_info=True, **asked)
    assert type(model) is HEADS[auto_class]
    assert not info["unexpected_keys"] and all(key.startswith(HEAD_PARAMETERS) for key in info["missing_keys"])
    assert_holds(model.encoder, folder, f"{encoder}_encoder.")

    model.save_pretrained(tmp_path / "head")
    again, info = auto_class.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert all(again.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())
    AutoModel.from_pretrained(tmp_path / "head").save_pretrained(tmp_path / "encoder")  # out of the head again
    assert_holds(model.encoder, tmp_path / "encoder", "")


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_encoder_folder(folder, tmp_path, encoder):
    model = AutoModel.from_pretrained(folder, encoder=encoder)
    assert type(model) is TJEPAModel
    assert_holds(model, folder, f"{encoder}_encoder.")
    model.save_pretrained(tmp_path / "encoder")
    assert_holds(model, tmp_path / "encoder", "")
    for auto_class in HEADS:
        assert_holds(auto_class.from_pretrained(tmp_path / "encoder").encoder, tmp_path / "encoder", "")


def test_impossible_encoders_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="must be 'target'.*or 'context', got 'teacher'"):
        TJEPAModel.from_pretrained(folder, encoder="teacher")
    with pytest.raises(ValueError, match="holds both encoders"):
        TJEPAForPreTraining.from_pretrained(folder, encoder="context")
    TJEPAModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="has no context encoder"):
        TJEPAForSequenceClassification.from_pretrained(tmp_path / "encoder", encoder="context")


def test_masked_lm_starts_from_the_pretrained_token_head(make_model, tmp_path):
    pretraining = make_model(token_prediction_weight=1.0)
    pretraining.save_pretrained(tmp_path)
    model, info = TJEPAForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.token_head.dense.weight.equal(pretraining.token_head.dense.weight)
    _, info = TJEPAForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("encoder", ["target", "context"])
def test_an_untied_decoder_starts_from_the_token_embedding(make_model, tmp_path, encoder):
    make_model(token_prediction_weight=1.0).save_pretrained(tmp_path / "pretraining")
    untied = {"tie_word_embeddings": False, "encoder": encoder}
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "pretraining", output_loading_info=True, **untied)
    tied = AutoModelForMaskedLM.from_pretrained(tmp_path / "pretraining", encoder=encoder)
    assert not info["missing_keys"] and model.decoder.weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(model.eval()(INPUT_IDS).logits, tied.eval()(INPUT_IDS).logits)
    with torch.no_grad():
        model.decoder.weight.zero_()
    model.save_pretrained(tmp_path / "head")
    assert not AutoModelForMaskedLM.from_pretrained(tmp_path / "head").decoder.weight.any()


@pytest.mark.parametrize("how", ["hook", "quantised", "offloaded"])
def test_masked_lm_calls_its_decoder(make_model, tmp_path, how):
    """Reading its weight would leave out what stands around it, and fail where it has none at hand."""
    make_model(token_prediction_weight=1.0).save_pretrained(tmp_path / "folder")
    model = TJEPAForMaskedLM.from_pretrained(tmp_path / "folder").eval()
    with torch.no_grad():
        model.token_head.bias.normal_()
        before = model(INPUT_IDS).logits
        model.save_pretrained(tmp_path / "head")
        tolerance = {"rtol": 1e-5, "atol": 1e-5}
        if how == "hook":
            model.decoder.register_forward_hook(lambda module, args, output: 2 * output)
            before = 2 * before - model.token_head.bias
        elif how == "quantised":
            model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
            tolerance = {"rtol": 0, "atol": 0.5}
        else:
            places = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
            model = TJEPAForMaskedLM.from_pretrained(tmp_path / "head", **places)
        torch.testing.assert_close(model(INPUT_IDS).logits, before, **tolerance)


def test_remote_code_in_a_clean_process(folder, tmp_path):
    code = f"""
import sys; sys.modules["tjepa"] = None
import transformers
for name in {[auto_class.__name__ for auto_class in HEADS]}:
    for encoder in ("target", "context"):
        loading = {{"trust_remote_code": True, "encoder": encoder}}
        model = getattr(transformers, name).from_pretrained(sys.argv[1], **loading)
    model.save_pretrained(sys.argv[2] + name)
    getattr(transformers, name).from_pretrained(sys.argv[2] + name, trust_remote_code=True)
"""
    arguments = [sys.executable, "-c", code, str(folder), str(tmp_path / "head")]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


# --- Pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "first", "attention"])
def test_pooling_reads_real_tokens_only(pooling):
    model = TJEPAForSequenceClassification(make_tiny_config(classifier_pooling=pooling)).eval()
    logits = model(INPUT_IDS, attention_mask=ATTENTION_MASK).logits
    alone = model(INPUT_IDS[1:, :2]).logits
    torch.testing.assert_close(logits[1:], alone)
    left = model(INPUT_IDS[1:].roll(2, 1), attention_mask=ATTENTION_MASK[1:].roll(2, 1)).logits  # relative positions
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-5)


def test_pooled_vectors_by_hand():
    states = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    pool = {}
    for pooling in ("mean", "first", "attention"):
        pool[pooling] = TJEPAPooling(make_tiny_config(classifier_pooling=pooling))
    assert pool["mean"](states, mask).tolist() == [[2.0, 4.0]]
    assert pool["first"](states, mask).tolist() == [[1.0, 2.0]]
    # scores log(3) * feature 0 / 2: their softmax is 1/4 and 3/4
    pool["attention"].score.weight = torch.nn.Parameter(torch.tensor([[math.log(3.0) / 2, 0.0]]))
    torch.testing.assert_close(pool["attention"](states, mask), torch.tensor([[2.5, 5.0]]))


def test_unknown_pooling_is_refused():
    with pytest.raises(StrictDataclassError, match=r"expected one of \('mean', 'first', 'attention'\), got max"):
        make_tiny_config(classifier_pooling="max")


# --- Losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels", "loss"),
    [
        (3, None, torch.tensor([2, 0]), F.cross_entropy),
        (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]), F.binary_cross_entropy_with_logits),
        (1, None, torch.tensor([[0.5], [-2.0]]), F.mse_loss),
        (3, "regression", torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.5, 1.0]]), F.mse_loss),
    ],
)
def test_problem_types(num_labels, problem_type, labels, loss):
    model = TJEPAForSequenceClassification(make_tiny_config(num_labels=num_labels, problem_type=problem_type))
    output = model(INPUT_IDS, attention_mask=ATTENTION_MASK, labels=labels)
    assert output.logits.shape == (2, num_labels)
    torch.testing.assert_close(output.loss, loss(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # nothing is unused


def test_losses_per_token():
    labels = torch.tensor([[1, 0, -100, 2], [2, -100, -100, -100]])
    for model in (TJEPAForTokenClassification(make_tiny_config(num_labels=3)), TJEPAForMaskedLM(make_tiny_config())):
        output = model(INPUT_IDS, attention_mask=ATTENTION_MASK, labels=labels)
        torch.testing.assert_close(output.loss, F.cross_entropy(output.logits.flatten(0, 1), labels.flatten()))
        split = model(INPUT_IDS, attention_mask=ATTENTION_MASK, labels=labels, num_items_in_batch=8)
        torch.testing.assert_close(split.loss, output.loss / 2)  # the Trainer counts 8 labels over two micro-batches
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_question_answering():
    model = TJEPAForQuestionAnswering(make_tiny_config())
    start, end = torch.tensor([0, 1]), torch.tensor([3, 1])
    output = model(INPUT_IDS, attention_mask=ATTENTION_MASK, start_positions=start, end_positions=end)
    expected = (F.cross_entropy(output.start_logits, start) + F.cross_entropy(output.end_logits, end)) / 2
    torch.testing.assert_close(output.loss, expected)
    for outside in (-1, 4):  # an answer that is not in the row
        start[0] = end[0] = outside
        output = model(INPUT_IDS, attention_mask=ATTENTION_MASK, start_positions=start, end_positions=end)
        expected = F.cross_entropy(output.start_logits[1:], start[1:]) + F.cross_entropy(
            output.end_logits[1:], end[1:]
        )
        torch.testing.assert_close(output.loss, expected / 2)


# --- transformers' conventions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_masked_lm_resizes_and_keeps_its_ties(tmp_path, tie_word_embeddings):
    model = TJEPAForMaskedLM(make_tiny_config(tie_word_embeddings=tie_word_embeddings)).eval()
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie_word_embeddings
    before = model(INPUT_IDS).logits
    model.resize_token_embeddings(70)
    after = model(INPUT_IDS).logits
    torch.testing.assert_close(after[..., :60], before)
    assert after.shape[-1] == model.config.vocab_size == len(model.token_head.bias) == 70
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tie_word_embeddings
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(TJEPAForMaskedLM.from_pretrained(tmp_path).eval()(INPUT_IDS).logits, after)
    model.resize_token_embeddings(50)
    torch.testing.assert_close(model(INPUT_IDS).logits, before[..., :50])


@pytest.mark.parametrize("model_class", HEADS.values())
def test_hidden_states_and_attentions(model_class):
    config = make_tiny_config()
    config._attn_implementation = "eager"
    output = model_class(config)(INPUT_IDS, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 4, 32)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 4, 4, 4)] * 2


@pytest.mark.parametrize("model_class", HEADS.values())
def test_tuples_where_the_config_asks_for_them(model_class):
    (logits,) = model_class(make_tiny_config(return_dict=False))(INPUT_IDS)[:1]
    assert logits.shape[0] == 2


@pytest.mark.parametrize("pooling", ["mean", "first", "attention"])
def test_an_empty_text_has_the_vector_0(pooling):
    pool = TJEPAPooling(make_tiny_config(classifier_pooling=pooling))
    mask = torch.tensor([[1, 1], [0, 0]])
    with torch.no_grad():
        assert pool(torch.ones(2, 2, 32), mask)[1].tolist() == [0.0] * 32
        assert pool(torch.ones(2, 0, 32), mask[:, :0]).tolist() == [[0.0] * 32] * 2
