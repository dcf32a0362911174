"""The reference run, reproduced: every output, every gradient and the loss to 1e-5, the schedules to 1e-9."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tjepa import TJEPAForPreTraining
from tjepa.corpus.strategies import load_masking_strategies
from tjepa.data_collator_tjepa import Views, pack_batch
from tjepa.tools.convert_checkpoint import convert_checkpoint, convert_state_dict


@pytest.fixture(scope="module")
def reference_folder(shared_folder):
    return shared_folder / "golden" / "reference-run"


@pytest.fixture(scope="module")
def activations(reference_folder):
    return load_file(reference_folder / "activations.safetensors")


@pytest.fixture(scope="module")
def converted(reference_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert_checkpoint(reference_folder, folder)
    return folder


def reference_views(activations, num_strategies: int):
    """The reference's documents and its index tensors as our `Views`, its blocks read off its dense masks."""
    real = activations["attention_mask"].bool()
    documents = [ids[mask].numpy() for ids, mask in zip(activations["input_ids"], real, strict=True)]
    starts = np.cumsum([0] + [len(document) for document in documents])
    columns = {name: [] for name in ("context_token", "context_view", "slot_token", "slot_view", "slot_block")}
    document, strategy = [], []
    for s in range(num_strategies):
        names = ("context_block_indices", "context_attn_mask", "target_block_indices", "target_slot_mask")
        context, context_mask, target, slot_mask = (activations[f"strategy{s}.{name}"] for name in names)
        num_contexts = context.shape[1]
        dense = activations[f"strategy{s}.prediction_attn_mask"][:, num_contexts:, num_contexts:]
        for d in range(len(documents)):
            context_tokens = starts[d] + context[d][context_mask[d]].numpy()
            slot_tokens = starts[d] + target[d][slot_mask[d]].numpy()
            same_block = dense[d][slot_mask[d]][:, slot_mask[d]].int()
            block = np.unique(same_block.argmax(dim=1).numpy(), return_inverse=True)[1] + 1
            view = len(document)
            columns["context_token"].append(context_tokens)
            columns["context_view"].append(np.full(len(context_tokens), view))
            columns["slot_token"].append(slot_tokens)
            columns["slot_view"].append(np.full(len(slot_tokens), view))
            columns["slot_block"].append(block)
            document.append(d)
            strategy.append(s)
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}
    return documents, Views(document=np.array(document), strategy=np.array(strategy), **flat)


@pytest.mark.parametrize("row_length", [None, 96])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_reference_run(reference_folder, activations, converted, attn_implementation, row_length):
    expected = json.loads((reference_folder / "expected.json").read_text())
    num_strategies = len(expected["loss_per_strategy"])
    documents, views = reference_views(activations, num_strategies)
    batch = pack_batch(documents, views, num_strategies, row_length)
    model = TJEPAForPreTraining.from_pretrained(converted, attn_implementation=attn_implementation)
    model.train()
    output = model(**batch)

    def close(actual, reference):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)

    # The reference sums over features where we take the mean.
    width = model.config.hidden_size
    close(output.loss_per_strategy * width, torch.tensor(expected["loss_per_strategy"]))
    assert output.loss.item() * width == pytest.approx(expected["mean_loss"], abs=1e-4, rel=1e-6)

    labels = activations["target_embeddings"]
    target_states = model.target_encoder(
        batch["input_ids"], position_ids=batch["position_ids"], view_ids=batch["document_ids"]
    )[0]
    context_place = {  # (view, position) of every context entry in stream 2 -> its place there
        (int(view), int(position)): place
        for place, (view, position) in enumerate(
            zip(
                batch["context_view_ids"].flatten(),
                batch["position_ids"].flatten()[batch["context_indices"].flatten()],
                strict=True,
            )
        )
        if view >= 0
    }
    slot_views = batch["prediction_view_ids"].flatten()[batch["slot_indices"]]
    for view, (d, s) in enumerate(zip(views.document, views.strategy, strict=True)):
        context_mask = activations[f"strategy{s}.context_attn_mask"][d]
        positions = activations[f"strategy{s}.context_block_indices"][d][context_mask].tolist()
        places = [context_place[view, position] for position in positions]
        close(output.context_states[places], activations[f"strategy{s}.context_encoder_output"][d][context_mask])
        slot_mask = activations[f"strategy{s}.target_slot_mask"][d]
        predictions = activations[f"strategy{s}.predicted_embeddings"][d][slot_mask]
        close(output.predictions[slot_views == view], predictions)
        close(
            output.labels[slot_views == view],
            labels[d][activations[f"strategy{s}.target_block_indices"][d][slot_mask]],
        )
    real = activations["attention_mask"].bool()
    for d in range(len(documents)):
        close(target_states[batch["document_ids"] == d], activations["target_encoder_output"][d][real[d]])

    (output.loss * width).backward()
    gradients = load_file(reference_folder / "gradients.safetensors")
    converted_gradients = {}
    for part in ("context_encoder", "predictor"):
        of_part = {k.removeprefix(f"{part}."): v for k, v in gradients.items() if k.startswith(f"{part}.")}
        converted_gradients.update(convert_state_dict(of_part, f"{part}.", model.config.rotary_dim))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == converted_gradients.keys()
    for name, parameter in trained.items():
        close(parameter.grad, converted_gradients[name])
    assert all(parameter.grad is None for parameter in model.target_encoder.parameters())


def test_reference_strategies_are_translated(converted):
    strategies = load_masking_strategies(converted / "masking_strategies.json")
    assert [s.target_block_size_mean for s in strategies] == [3, 8, 3, 8, 64, 64, 64]
    assert strategies[-1].max_target_mask_start_ratio == 0.75 and strategies[-1].target_block_num == 1


def test_nothing_is_written_over_a_folder_that_holds_files(reference_folder, converted):
    before = {path: path.read_bytes() for path in converted.iterdir()}
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert_checkpoint(reference_folder, converted)
    assert before == {path: path.read_bytes() for path in converted.iterdir()}
