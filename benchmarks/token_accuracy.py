"""How often the hidden token is named: by T-JEPA's token head, by a masked language model, by token frequencies.

python benchmarks/token_accuracy.py --dataset_name runs/books64 --seconds 200 --seeds 0

Both models are trained here, as benchmarks/learning_curve.py trains them (recipes `tjepa` and `mlm`): the same encoder
on the same documents for the same CPU time. Both are asked for the same hidden tokens of the validation split: single
tokens and blocks of four. The masked language model reads its mask token there, T-JEPA's encoder nothing; `tjepa,
decoder` is the same run without the prediction of tokens (weight 0), whose predictions a token head was fitted to
afterwards, as `tjepa train-decoder` does.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np
import torch
from learning_curve import NUM_TIMED_STEPS, NUM_WARMUP_STEPS, Recipe, Training, load_recipes
from torch.nn import functional as F
from transformers import AutoTokenizer

from tjepa.corpus.documents import DataArguments, load_documents
from tjepa.data_collator_tjepa import DataCollatorForTJEPA, MaskingStrategy
from tjepa.tools.train_decoder import train_decoder


HIDDEN = {  # what is hidden of each document: a tenth of its tokens
    "single tokens": MaskingStrategy(1, max_target_mask_ratio=0.1),
    "blocks of 4": MaskingStrategy(4, max_target_mask_ratio=0.1),
}
BATCH_SIZE = 64
NUM_DECODER_STEPS = 300
DECODER = "tjepa, decoder"
NAMES = ("tjepa", "mlm", DECODER)


def train(values: dict, name: str, seed: int, documents: list[np.ndarray], tokenizer, seconds: float):
    """The model after so many CPU seconds of steps, and the seconds and steps that it took."""
    recipe = Recipe.from_dict(name, values)
    timed = list(Training(recipe, documents, tokenizer, seed, NUM_TIMED_STEPS))[NUM_WARMUP_STEPS:]
    num_steps = max(1, round(seconds / statistics.mean(step["seconds"] for step in timed)))
    training = Training(recipe, documents, tokenizer, seed, num_steps)
    taken = sum(step["seconds"] for step in training)
    return training.objective.model.eval(), taken, num_steps


@torch.no_grad()
def token_logits(model, batch: dict, mask_token_id: int) -> torch.Tensor:
    """float32 [num_places, vocab_size] at the hidden places of a batch of one view for each document."""
    if hasattr(model, "predictor"):
        return model.token_head(model(**batch).predictions, model.get_input_embeddings().weight).float()
    input_ids = batch["input_ids"].flatten().long()
    input_ids[batch["label_indices"].long()] = mask_token_id
    states = model.encoder(
        input_ids.view_as(batch["input_ids"]), position_ids=batch["position_ids"], view_ids=batch["document_ids"]
    ).last_hidden_state
    return model.token_head(states.flatten(0, 1)[batch["label_indices"].long()], model.decoder.weight).float()


def judge(model, strategy: MaskingStrategy, documents: list[np.ndarray], mask_token_id: int) -> tuple[float, float]:
    """Accuracy and cross entropy (nats) at the hidden places of documents."""
    collator, right, nats = DataCollatorForTJEPA([strategy], seed=0), [], []
    for at in range(0, len(documents), BATCH_SIZE):
        examples = [
            {"input_ids": ids, "document_index": index, "epoch": 0}
            for index, ids in enumerate(documents[at : at + BATCH_SIZE], start=at)
        ]
        batch = collator(examples)
        tokens = batch["input_ids"].flatten()[batch["label_indices"].long()].long()
        logits = model if torch.is_tensor(model) else token_logits(model, batch, mask_token_id)
        logits = logits.expand(len(tokens), -1)
        right.append(logits.argmax(dim=-1) == tokens)
        nats.append(F.cross_entropy(logits, tokens, reduction="none"))
    return torch.cat(right).float().mean().item(), torch.cat(nats).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset_name", required=True, help="folder written by tjepa prepare, of two splits")
    parser.add_argument("--seconds", type=float, required=True, help="CPU seconds of training of each model")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--recipes", type=Path, default=Path(__file__).with_name("learning_recipes.yaml"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dataset = load_documents(DataArguments(dataset_name=args.dataset_name))
    documents, validation = (list(dataset[s].with_format("numpy")["input_ids"][:]) for s in ("train", "validation"))
    validation = validation[:2000]
    tokenizer = AutoTokenizer.from_pretrained(args.dataset_name)
    counts = torch.bincount(torch.from_numpy(np.concatenate(documents)).long(), minlength=len(tokenizer))
    rows = {"frequencies": [(None, None, (counts + 1).float().log().log_softmax(dim=-1)[None])]}

    recipes = load_recipes(args.recipes, [], None)
    recipes[DECODER] = {**recipes["tjepa"], "token_prediction_weight": 0.0}
    for name in args.only:
        rows[name] = []
        for seed in args.seeds:
            model, seconds, num_steps = train(recipes[name], name, seed, documents, tokenizer, args.seconds)
            if name == DECODER:
                strategies = Training(Recipe.from_dict(name, recipes[name]), documents, tokenizer, seed, 1)
                collator = strategies.objective.collator
                train_decoder(model, [ids.tolist() for ids in documents[:20_000]], collator, NUM_DECODER_STEPS, seed)
            rows[name].append((seconds, num_steps, model))

    print("| | steps | CPU s | " + " | ".join(f"{name}: right | nats" for name in HIDDEN) + " |")
    print("| --- " * (3 + 2 * len(HIDDEN)) + "|")
    for name, runs in rows.items():
        cells = []
        for strategy in HIDDEN.values():
            figures = [judge(model, strategy, validation, tokenizer.mask_token_id) for *_, model in runs]
            right, nats = (statistics.mean(column) for column in zip(*figures, strict=True))
            cells += [f"{right:.1%}", f"{nats:.2f}"]
        spent = ["", ""]
        if runs[0][0] is not None:
            spent = [
                f"{statistics.mean(run[1] for run in runs):.0f}",
                f"{statistics.mean(run[0] for run in runs):.0f}",
            ]
        print(f"| {' | '.join([name, *spent, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
