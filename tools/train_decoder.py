"""Fits a token head to the predictions of a model that was pretrained without one.

    tjepa train-decoder runs/mine
    tjepa train-decoder runs/mine --file my.txt --num_steps 2000

Notable: encoders and predictor stay as they are, to the bit; what is fitted is only how their predictions are read as
words. Afterwards `tjepa fill` and `predict_tokens` work on the folder, which pretraining can still go on from.
"""

import argparse
import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from datasets.utils import tqdm
from transformers import PreTrainedTokenizerBase

from ..corpus.atomic_writes import check_writable, replacing_files
from ..corpus.command_line import at_least_one, start
from ..corpus.private import initialise
from ..corpus.quickstart import load_quickstart_documents
from ..corpus.strategies import load_masking_strategies
from ..corpus.tokenizers import longest_input, text_reader
from ..data_collator_tjepa import DataCollatorForTJEPA
from ..modeling_tjepa import TJEPAForPreTraining
from ..predictors_tjepa import TJEPATokenHead
from ..training.checkpoints import is_marked
from ..training.model_folder import STRATEGIES_FILE
from ..training.setup import hide_what_loading_says
from .fill import load_for_filling, tokens_around
from .search import add_text_flags, load_passages


BATCH_SIZE = 16  # documents
LEARNING_RATE = 1e-3
HELD_OUT = 10  # every tenth text is not fitted on


class DecoderFigures(NamedTuple):
    accuracy: float  # of the likeliest token, at the hidden places of held-out texts
    most_frequent: float  # the same of always naming the most frequent token of the others
    num_places: int


def train_decoder(
    model: TJEPAForPreTraining, documents: list[list[int]], collator: DataCollatorForTJEPA, num_steps: int, seed: int
) -> DecoderFigures:
    """
    Gives the model a token head, and fits that alone: cross entropy of the hidden tokens, AdamW.

    Args:
        model: whose head, if it has one, is fitted further.
        documents: token ids of each text; every tenth is held out, to judge by.
        collator: hides tokens.
        num_steps: of 16 documents each.
        seed: of the new head and the order of documents.

    Raises:
        ValueError: if there are too few documents.
    """
    examples = [{"input_ids": ids, "document_index": index, "epoch": 0} for index, ids in enumerate(documents)]
    held_out = examples[::HELD_OUT]
    fitted = [example for index, example in enumerate(examples) if index % HELD_OUT]
    if not fitted:
        raise ValueError(f"A token head is fitted on some texts and judged on others; there are {len(examples)}.")
    torch.manual_seed(seed)
    if model.token_head is None:
        model.token_head = TJEPATokenHead(model.config, model.get_input_embeddings().weight.shape[1])
        initialise(model, model.token_head)
        model.token_head.fit_to(model.get_input_embeddings().weight)
        model.token_head.to(model.device)
    model.config.token_decoder = True
    model.eval().measure_encoders()  # which settles what trains: before the head does
    head, embedding = model.token_head.requires_grad_(True), model.get_input_embeddings().weight.detach()
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps + 1)
    generator = torch.Generator().manual_seed(seed)

    def predict(batch: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions [num_places, hidden_size] and the tokens that are hidden there [num_places]."""
        inputs = send_to_device(collator(batch), model.device)
        with torch.no_grad():
            output = model(**inputs)
        states = output.context_states[inputs["hidden_indices"]] if collator.in_place else output.predictions
        return states, inputs["input_ids"].flatten()[inputs["label_indices"]].long()

    for step in tqdm(range(num_steps), desc="Fitting the token head"):
        chosen = torch.randint(len(fitted), (BATCH_SIZE,), generator=generator).tolist()
        predictions, tokens = predict([{**fitted[index], "epoch": step} for index in chosen])
        head(predictions, embedding, tokens).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    head.requires_grad_(model.trains_token_head)

    counts = torch.zeros(model.config.vocab_size)
    for example in fitted:
        counts += torch.bincount(torch.as_tensor(example["input_ids"]), minlength=len(counts))
    num_right, num_frequent, num_places = 0, 0, 0
    for at in range(0, len(held_out), BATCH_SIZE):
        predictions, tokens = predict(held_out[at : at + BATCH_SIZE])
        with torch.no_grad():
            num_right += int((head(predictions, embedding).argmax(dim=-1) == tokens).sum())
        num_frequent += int((tokens == int(counts.argmax())).sum())
        num_places += len(tokens)
    return DecoderFigures(num_right / num_places, num_frequent / num_places, num_places)


def tokenize(texts: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[list[int]]:
    """Token ids of the texts, cut to `max_length`; those of fewer than two tokens hide nothing, and are left out."""
    encoded = text_reader(tokenizer)(texts, add_special_tokens=False, truncation=True, max_length=max_length)
    return [ids for ids in encoded["input_ids"] if len(ids) >= 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("folder", help="folder of a run; the token head is added to it")
    add_text_flags(parser)
    parser.add_argument("--num_steps", type=at_least_one, default=300, help="of 16 texts each (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="of the head, and of what is read when (default: 0)")
    args = parser.parse_args()
    hide_what_loading_says()
    if not Path(args.folder).is_dir():
        raise FileNotFoundError(f"{args.folder} is not a folder; the token head is saved in that of the model.")
    if is_marked(Path(args.folder)):
        raise ValueError(f"{args.folder} is a checkpoint, and could not be resumed any more: name the run's folder.")
    model, tokenizer = load_for_filling(args.folder, "FOLDER")
    if model.config.token_prediction_weight > 0:
        raise ValueError(f"{args.folder} has learned to predict tokens in pretraining: tjepa fill reads them.")
    folder = Path(model.name_or_path)  # where the predictor is
    check_writable(folder, "FOLDER")
    strategies = folder / STRATEGIES_FILE
    collator = DataCollatorForTJEPA(load_masking_strategies(strategies if strategies.is_file() else "ul2"), args.seed)
    collator.fit_to(model.config)
    max_length = longest_input(tokenizer, model)
    collator.special_tokens = tokens_around(model, tokenizer)
    max_length -= sum(map(len, collator.special_tokens))
    if args.file is None and args.text_column_name is None:
        texts = load_quickstart_documents()["train"]["text"][:]
    else:
        texts = list(load_passages(args.file, args.text_column_name))
    figures = train_decoder(model, tokenize(texts, tokenizer, max_length), collator, args.num_steps, args.seed)
    with replacing_files(folder) as unfinished:
        model.save_pretrained(unfinished)
    print(
        f"{folder} has a token head now. At {figures.num_places:,} hidden places of texts that it was not fitted on, "
        f"it names the right token for {figures.accuracy:.1%}; always naming the most frequent one is right for "
        f'{figures.most_frequent:.1%}.\nNext: tjepa fill "The [3] sat on the mat" --model {shlex.quote(args.folder)}'
    )


if __name__ == "__main__":
    start(main)
