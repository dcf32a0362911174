"""Words of texts and what the target encoder says of each: what pretraining compares a prediction with.

Notable: a prediction has no words of its own. The words that lie nearest to it, in texts that a reader knows, say what
it is about, also where a model has no token head.
"""

import re
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..corpus.tokenizers import text_reader
from ..data_collator_tjepa import MASKING_PRESETS, DataCollatorForTJEPA
from ..downstream.embedding import pack_into_row
from ..encoders_tjepa import make_labels
from ..modeling_tjepa import TJEPAForPreTraining
from .fill import tokens_around


WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
SHOWN_CHARS = 60  # of a text on either side of a word
MAX_LOOKUP_TOKENS, LOOKUP_TEXT_TOKENS, TEXTS_PER_ROW = 30_000, 64, 64


def split_into_words(text: str) -> list[tuple[str, bool]]:
    """The words and punctuation marks of a text, and what stands between them: pieces, and whether each is a word."""
    pieces, end = [], 0
    for match in WORD.finditer(text):
        pieces += [(text[end : match.start()], False), (match.group(), True)]
        end = match.end()
    return [piece for piece in [*pieces, (text[end:], False)] if piece[0]]


def split_into_tokens(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[tuple[int, str]]:
    """Ids of the first tokens, and for each what it stands for in the text, white space before it included."""
    settings = {"add_special_tokens": False, "truncation": True, "max_length": max_length}
    encoding = tokenizer(text, **settings, return_offsets_mapping=tokenizer.is_fast)
    if not tokenizer.is_fast:
        return [(token, tokenizer.decode([token])) for token in encoding["input_ids"]]
    tokens, end = [], 0
    for token, (_, stop) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        tokens.append((token, text[end:stop]))
        end = max(end, stop)
    return tokens


def owners_of_tokens(tokens: list[str], words: list[tuple[str, bool]]) -> list[int]:
    """
    Of each token the index into `words` of what its first character, white space aside, belongs to.

    Args:
        tokens: pieces of a text, white space before them included; a piece of a character may be "".
        words: pieces of the same text.
    """
    owner = np.repeat(np.arange(len(words)), [len(piece) for piece, _ in words])
    places, start = [], 0
    for token in tokens:
        first = start + len(token) - len(token.lstrip())
        if not token:
            places.append(places[-1] if places else 0)
        else:
            places.append(int(owner[min(first, start + len(token) - 1)]))
        start += len(token)
    return places


class Lookup:
    """
    Words of texts and what the target encoder says of each: its label in pretraining, of the word's first token.

    Args:
        passages: each text, and where it is from; of many, some.
    """

    def __init__(self, model: TJEPAForPreTraining, tokenizer: PreTrainedTokenizerBase, passages: dict[str, str]):
        reader, (before, behind) = text_reader(tokenizer), tokens_around(model, tokenizer)
        self.words, documents, num_tokens = [], [], 0
        texts = list(passages)
        for place in np.random.default_rng(0).permutation(len(texts)):
            tokens = split_into_tokens(texts[place], reader, LOOKUP_TEXT_TOKENS)
            if not tokens or num_tokens > MAX_LOOKUP_TOKENS:
                continue
            num_tokens += len(tokens)
            ids, pieces = zip(*tokens, strict=True)
            documents.append(([*before, *ids, *behind], pieces, passages[texts[place]]))
        labels = []
        documents.sort(key=lambda document: len(document[0]))
        for first in range(0, len(documents), TEXTS_PER_ROW):
            labels.append(label_tokens(model, [ids for ids, _, _ in documents[first : first + TEXTS_PER_ROW]]))
        labels, kept, offset = torch.cat(labels), [], 0
        for ids, pieces, label in documents:
            words = split_into_words("".join(pieces))
            owners = owners_of_tokens(pieces, words)
            for index, owner in enumerate(owners):
                if words[owner][1] and owner not in owners[:index]:
                    kept.append(offset + len(before) + index)
                    self.words.append((words, owner, label))
            offset += len(ids)
        # what all labels or predictions have in common would hide in what they differ
        self.mean_prediction = mean_prediction(model, [ids for ids, _, _ in documents], (before, behind))
        self.vectors = F.normalize(labels[torch.tensor(kept)] - labels.mean(dim=0), dim=-1)

    def nearest(self, prediction: Tensor, num_results: int) -> list[dict[str, Any]]:
        """
        Of a prediction, float `[hidden_size]`, the nearest words, each in a text of its own.

        Returns:
            for each `score` (cosine), `label` (where the text is from), and the text as `before`, `word`, `behind`.
        """
        scores = self.vectors @ F.normalize(prediction.float().cpu() - self.mean_prediction, dim=-1)
        found = {}
        for place in scores.argsort(descending=True)[: 20 * num_results].tolist():
            words, at, label = self.words[place]
            before, behind = ("".join(word for word, _ in part) for part in (words[:at], words[at + 1 :]))
            text = before + words[at][0] + behind
            if text in found or len(found) == num_results:
                continue
            found[text] = {
                "score": scores[place].item(),
                "label": label,
                "before": before if len(before) <= SHOWN_CHARS else f"…{before[-SHOWN_CHARS:]}",
                "word": words[at][0],
                "behind": behind if len(behind) <= SHOWN_CHARS else f"{behind[:SHOWN_CHARS]}…",
            }
        return list(found.values())


@torch.no_grad()
def label_tokens(model: TJEPAForPreTraining, documents: list[list[int]]) -> Tensor:
    """
    What predictions of tokens are compared with in pretraining.

    Args:
        documents: token ids, those of equal length side by side.

    Returns:
        float32 `[num_tokens, hidden_size]` on the CPU, text after text.
    """
    row, groups = pack_into_row([torch.tensor(document) for document in documents], model.device)
    indices = torch.arange(row[0].shape[1], device=model.device)
    return make_labels(model.target_encoder, model.config, *row, indices, groups, model.measure_encoders())[0].cpu()


@torch.no_grad()
def mean_prediction(
    model: TJEPAForPreTraining, documents: list[list[int]], around: tuple[list[int], list[int]]
) -> Tensor:
    """float32 `[hidden_size]`: of single tokens, hidden in some of the documents (which stand between `around`)."""
    collator = DataCollatorForTJEPA(MASKING_PRESETS["single_tokens"], special_tokens=around)
    collator.fit_to(model.config)
    chosen = np.random.default_rng(0).permutation(len(documents))[:TEXTS_PER_ROW].tolist()
    inner = [documents[place][len(around[0]) : len(documents[place]) - len(around[1])] for place in chosen]
    batch = collator([{"input_ids": ids, "document_index": place, "epoch": 0} for place, ids in enumerate(inner)])
    return model(**send_to_device(batch, model.device)).predictions.float().mean(dim=0).cpu()
