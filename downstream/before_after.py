"""What continued pretraining did to an encoder: the same held-out texts, embedded before and after.

Three measures, a line each: how well the second half of a text is found by its first half, the probe where there are
labels, and how much of the similarity between texts was kept. A difference counts where it is larger than chance: two
standard errors over the texts. Vectors are those of `embed_texts`, the mean over a text's tokens.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

from ..corpus.documents import draw
from ..corpus.faults import find_fault
from ..corpus.files import load_table
from .embedding import embed_texts
from .labels import class_name, has_fractions, read_labels
from .probe import NUM_NEIGHBOURS, hold_out, linear_probe


MIN_TEXTS = 20  # fewer tell nothing
MAX_TEXTS = 500  # more take long, and tell little more
MIN_CHARS = 40  # of a text that is cut in half
MAX_LABELLED_TEXTS = 2000
CHANCE = 2.0  # standard errors


@dataclass
class BeforeAfterArguments:
    """Whether a run ends with what it did to the encoder that it started from."""

    report_before_after: bool = HfArg(
        default=False,
        help="Embed held-out texts before and after, and say whether the encoder got better. `tjepa adapt` does so.",
    )
    probe_file: str | None = HfArg(
        default=None,
        help="Labelled texts to judge the encoder by, with a frozen probe, at every evaluation and before and after: "
        "a json, jsonl, csv, tsv or parquet file with the columns text and label. Turns --report_before_after on.",
    )

    def __post_init__(self):
        self.report_before_after |= self.probe_file is not None


# --- Measures --------------------------------------------------------------------------------------------------------


def halves(text: str) -> tuple[str, str]:
    """A text cut at the white space that is nearest to its middle, or where it has none in its middle."""
    text = text.strip()
    middle = len(text) // 2
    cut = min((space.start() for space in re.finditer(r"\s", text)), key=lambda at: abs(at - middle), default=middle)
    return text[:cut], text[cut:].strip()


def reciprocal_ranks(queries: Tensor, answers: Tensor) -> np.ndarray:
    """
    How well each query finds its own answer among all of them by cosine: 1 / rank, whose mean is the MRR. An answer
    that is as near counts as nearer, so that an encoder for which all texts are equal finds nothing.

    Args:
        queries, answers: floating `[num_texts, hidden_size]`; the rows of a number belong together.

    Returns:
        float64 `[num_texts]`.
    """
    similarity = cosine_similarity(queries.double().numpy(), answers.double().numpy())
    rounding = 1e-9  # equal vectors are rarely equal to the bit
    return 1.0 / (similarity >= similarity.diagonal()[:, None] - rounding).sum(axis=1)


def neighbours_kept(before: Tensor, after: Tensor, k: int = NUM_NEIGHBOURS) -> np.ndarray:
    """
    Of each text's `k` nearest others by cosine, the share that are among them in both spaces.

    Args:
        before, after: floating `[num_texts, hidden_size]`, of more than `k` texts; sizes may differ.

    Returns:
        float64 `[num_texts]`.
    """
    search = NearestNeighbors(n_neighbors=k, metric="cosine")
    nearest = [search.fit(vectors.double().numpy()).kneighbors(return_distance=False) for vectors in (before, after)]
    return np.array([np.isin(*rows).mean() for rows in zip(*nearest, strict=True)])


class Difference(NamedTuple):
    before: float
    after: float
    error: float  # standard error of after - before

    @property
    def verdict(self) -> str:
        if abs(self.after - self.before) <= CHANCE * self.error:
            return "no difference beyond chance"
        return "better" if self.after > self.before else "worse"


def paired_difference(before: np.ndarray, after: np.ndarray) -> Difference:
    """Of a figure that every text has before and after, `[num_texts]`."""
    error = float((after - before).std(ddof=1) / np.sqrt(len(after)))
    return Difference(float(before.mean()), float(after.mean()), error)


def difference_of_accuracies(before: float, after: float, num_texts: int) -> Difference:
    """Of shares of the same texts. The error is that of two independent sets of texts, which is larger."""
    error = np.sqrt((before * (1 - before) + after * (1 - after)) / num_texts)
    return Difference(before, after, float(error))


# --- The report ------------------------------------------------------------------------------------------------------


class Embedded(NamedTuple):
    """float32 `[num_texts, hidden_size]` each: of the held-out texts' halves, and of the labelled texts, if any."""

    first: Tensor
    second: Tensor
    labelled: Tensor | None


def held_out_texts(documents, text_column_name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str | None]:
    """The texts of a split, a dataset or a stream; of one that was tokenized before, what its tokens say."""
    for row in documents:
        is_text = "input_ids" not in row
        yield row[text_column_name] if is_text else tokenizer.decode(row["input_ids"], skip_special_tokens=True)


class BeforeAfter:
    """
    The texts to compare an encoder with itself on.

    Args:
        texts: held out of training; at most `MAX_TEXTS` of those that have `MIN_CHARS` are used, the first of equals.
        probe_file: where labelled texts are, if there are any.

    Raises:
        FileNotFoundError, ValueError: for a `probe_file` that is not there, or cannot be used.
    """

    def __init__(self, texts: Iterable[str | None], probe_file: str | None = None):
        usable = [text for text in dict.fromkeys(texts) if find_fault(text) is None and len(text.strip()) >= MIN_CHARS]
        self.pairs = [halves(usable[index]) for index in np.flatnonzero(draw(len(usable), MAX_TEXTS))]
        self.labelled, self.labels, self.class_names = [], None, []
        if probe_file is not None:
            self.labelled, self.labels, self.class_names = read_labelled_texts(probe_file)

    def embed(self, encoder: torch.nn.Module, tokenizer, max_length: int) -> Embedded | None:
        """What the encoder makes of them now; `None` where there is not enough to tell anything."""
        if len(self.pairs) < MIN_TEXTS and not self.labelled:
            return None
        firsts, seconds = zip(*self.pairs, strict=True) if self.pairs else ((), ())
        texts = [*firsts, *seconds, *self.labelled]
        vectors = embed_texts(encoder, tokenizer, texts, max_length)
        first, second, labelled = vectors.split([len(firsts), len(seconds), len(self.labelled)])
        return Embedded(first, second, labelled if self.labelled else None)

    def report(self, before: Embedded | None, after: Embedded | None) -> dict[str, float | list[str]]:
        """Figures, and under `lines` what they say."""
        figures, lines = {}, []
        num_texts = len(self.pairs)
        if num_texts < MIN_TEXTS:
            lines.append(
                f"Retrieval and similarity: not judged, because {num_texts} held-out texts of {MIN_CHARS} characters "
                f"or more tell nothing; {MIN_TEXTS} would. Hold out more of them."
            )
        else:
            ranks = (reciprocal_ranks(part.first, part.second) for part in (before, after))
            found = paired_difference(*ranks)
            figures |= as_figures("retrieval", found)
            lines.append(
                f"Retrieval of a text's second half by its first: {found.verdict}. Mean reciprocal rank "
                f"{found.before:.3f} before, {found.after:.3f} after (± {found.error:.3f}), among {num_texts:,} "
                "held-out texts."
            )
        if self.labelled:
            accuracies, num_judged = zip(*(self.probe(part.labelled) for part in (before, after)), strict=True)
            probed = difference_of_accuracies(*accuracies, num_judged[0])
            figures |= as_figures("probe", probed)
            lines.append(
                f"Probe for the labels: {probed.verdict}. Accuracy {probed.before:.3f} before, {probed.after:.3f} "
                f"after (± {probed.error:.3f}), on {num_judged[0]:,} texts that the probe did not see."
            )
        else:
            lines.append("Probe for labels: not judged; --probe_file takes texts with labels.")
        if num_texts >= MIN_TEXTS:
            kept = neighbours_kept(torch.cat(before[:2]), torch.cat(after[:2]))
            figures["neighbours_kept"] = float(kept.mean())
            error = float(kept.std(ddof=1) / np.sqrt(len(kept)))
            lines.append(
                f"Similarity: {describe_kept(figures['neighbours_kept'])}. Of the {NUM_NEIGHBOURS} nearest neighbours "
                f"of a half text {figures['neighbours_kept']:.0%} (± {error:.0%}) are the same as before."
            )
        return {**figures, "lines": lines}

    def probe_now(self, encoder: torch.nn.Module, tokenizer, max_length: int) -> float:
        """What `probe` says of the labelled texts as the encoder embeds them now."""
        return self.probe(embed_texts(encoder, tokenizer, self.labelled, max_length))[0]

    def probe(self, features: Tensor) -> tuple[float, int]:
        """Accuracy of the probe on every second labelled text, and how many these are; it is trained on the others."""
        rows_of_parts = parts_of_labelled(len(features))
        parts = ((features[rows], self.labels[rows]) for rows in rows_of_parts)
        return linear_probe(*chain.from_iterable(parts)).accuracy, int(rows_of_parts[-1].sum())


def as_figures(name: str, difference: Difference) -> dict[str, float]:
    return {f"{name}_{key}": value for key, value in difference._asdict().items()}


def describe_kept(share: float) -> str:
    if share >= 0.9:
        return "kept"
    return "mostly kept" if share >= 0.6 else "changed; embed anew what you have embedded before"


def read_labelled_texts(path: str) -> tuple[list[str], Tensor, list[str]]:
    """
    Texts and their labels as numbers from 0 up, int64 `[num_texts]`, in random order; and the names of the labels.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no columns, not these, or too little in them.
    """
    rows = load_table("--probe_file", path)
    if missing := sorted({"text", "label"} - set(rows.column_names)):
        raise ValueError(f"--probe_file {path} has no column {missing[0]!r}, only {sorted(rows.column_names)}.")
    labels = read_labels(rows, "label")
    usable = [
        (text, class_name(label))
        for text, label in zip(rows["text"][:], labels, strict=True)
        if find_fault(text) is None and label is not None and not isinstance(label, list)
    ]
    if has_fractions(label for _, label in usable):
        raise ValueError(f"--probe_file {path}: label must hold classes, not numbers with a fraction.")
    usable = list(dict(usable).items())  # a text in both halves would be known to the probe
    usable = [usable[index] for index in np.random.default_rng(0).permutation(len(usable))[:MAX_LABELLED_TEXTS]]
    names = sorted({label for _, label in usable})
    if len(usable) < MIN_TEXTS or len(names) < 2:
        raise ValueError(
            f"--probe_file {path} has {len(usable)} texts with a label, of {len(names)} classes; a probe needs at "
            f"least {MIN_TEXTS} of two."
        )
    texts, names_of_texts = zip(*usable, strict=True)
    labels = torch.tensor([names.index(name) for name in names_of_texts])
    if labels[parts_of_labelled(len(labels))[0]].unique().numel() < 2:
        raise ValueError(
            f"--probe_file {path} has too few texts of all classes but one: the part to train on has one class alone."
        )
    return list(texts), labels, names


def parts_of_labelled(num_texts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which of so many texts, in random order, train a probe, choose and test with: bool `[num_texts]` each."""
    is_test = torch.arange(num_texts) % 2 == 1
    is_validation = torch.zeros_like(is_test)
    is_validation[~is_test] = hold_out(torch.arange(num_texts)[~is_test], seed=0)
    return ~is_test & ~is_validation, is_validation, is_test
