"""How a frozen encoder is judged, one way everywhere: mean-pool, whiten, logistic regression, accuracy.

Whitening is not a detail. Trained encoders keep much of what they know in directions of small variance, which a
regularised probe on the raw features never uses; without whitening an untrained encoder can win by default.
The statistics come from the probe's training part alone, the strength from its validation part, the verdict from its
test part. Everything after the encoder is scikit-learn's, on the CPU in float64: small and deterministic.

Top to bottom: the probe, neighbours, and on these the tasks: `probe_tasks` for an encoder and
`probe_tasks_with_tfidf` for the baseline give the same keys; `EmbeddingLayer` is a baseline that is probed like an
encoder. Texts and words become vectors in embedding.py, and are whitened in whitening.py; structure_tasks.py knows the
tasks on the order of sentences.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import ConstantInputWarning, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import paired_cosine_distances
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .embedding import embed_texts, embed_words
from .labels import IGNORED
from .sentence_scores import prefers_good, score_texts, why_it_cannot_score
from .structure_tasks import (
    COMBINED,
    MINIMAL_PAIRS,
    RETRIEVAL,
    combine,
    next_segment_figures,
    number_equal_sets,
    rows_of_sentences,
)
from .whitening import as_array, fit_whitening


logger = logging.getLogger(__name__)


# C, the inverse of the penalty, in half decades. From strong to weak, so that each fit starts near its optimum.
STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-8, 5))
MAX_STRENGTH_STEP = 150  # two decades, and room for rounding
NUM_NEIGHBOURS = 10


class ProbeResult(NamedTuple):
    accuracy: float  # on the test part
    strength: float  # C of a softmax regression, chosen on the validation part
    validation_accuracy: float  # at that strength: the maximum of a search, so a little optimistic


def best_logistic_regression(
    model: LogisticRegression,
    train: tuple[Any, Any],
    validation: tuple[Any, Any],
    test: tuple[Any, Any],
    strengths: Sequence[float],
    max_strength_step: float = float("inf"),
) -> ProbeResult:
    """
    Logistic regression at each strength, the best on the validation part judged on the test part.

    Args:
        model: how it is fitted; its C is set here.
        train, validation, test: features `[num_texts, width]`, an array or sparse, and labels `[num_texts]` of each.
        strengths: values of scikit-learn's C, from strong to weak regularisation.
        max_strength_step: the search ends so many times beyond the best strength so far.

    Returns:
        `ProbeResult`. Among equally good strengths the one that regularises most wins.
    """
    best = None
    for strength in strengths:
        if best is not None and strength > max_strength_step * best.strength:
            break
        model.set_params(C=strength).fit(*train)
        validation_accuracy = model.score(*validation)
        if best is None or validation_accuracy > best.validation_accuracy:
            best = ProbeResult(model.score(*test), strength, validation_accuracy)
    return best


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    whiten: bool = True,
) -> ProbeResult:
    """
    The probe: whitened features, logistic regression at each of `STRENGTHS`, the best on validation judged on test.

    Args:
        train, validation, test: floating `[num_texts, hidden_size]`, as from `embed_texts`.
        train_labels, validation_labels, test_labels: int64 `[num_texts]`, from 0 up.
        whiten: PCA whitening; without it the features are only centred.

    Returns:
        `ProbeResult`. The search ends two decades beyond the best strength: the weakly regularised fits take longest,
        and here they only overfit more.
    """
    transform = fit_whitening(train).transform if whiten else lambda features: features - as_array(train).mean(0)
    parts = [
        (transform(as_array(features)), labels.numpy())
        for features, labels in ((train, train_labels), (validation, validation_labels), (test, test_labels))
    ]
    # For two classes scikit-learn has one vector of weights where a softmax has two, each half as long: twice the C
    # penalises them alike, so that a strength means the same for any number of classes.
    scale = 2 if train_labels.unique().numel() == 2 else 1
    model = LogisticRegression(max_iter=1000, tol=1e-6, warm_start=True)
    probe = best_logistic_regression(model, *parts, [scale * strength for strength in STRENGTHS], MAX_STRENGTH_STEP)
    return probe._replace(strength=probe.strength / scale)


def knn_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, k: int = NUM_NEIGHBOURS
) -> float:
    """
    Accuracy of the vote of the `k` training texts nearest by cosine, after whitening; needs no training.

    Args:
        train, test: floating `[num_texts, hidden_size]`, as from `embed_texts`.
        train_labels, test_labels: int64 `[num_texts]`, from 0 up.
        k: voters, or the whole training part where that is smaller. The vote of each is weighed by its cosine.
    """
    whitening = fit_whitening(train)
    voters = make_voters(min(k, len(train))).fit(whitening.transform(as_array(train)), train_labels.numpy())
    return voters.score(whitening.transform(as_array(test)), test_labels.numpy())


def make_voters(k: int) -> KNeighborsClassifier:
    # 1e-9: texts that are all the same have cosines of 0, and there must be a vote
    return KNeighborsClassifier(k, metric="cosine", weights=lambda distances: 1 - distances + 1e-9)


def sts_spearman(first: Tensor, second: Tensor, scores: Tensor) -> dict[str, float]:
    """
    Spearman correlation of the cosine of two sentences' embeddings with human scores, without any training.

    Args:
        first, second: floating `[num_pairs, hidden_size]`, as from `embed_texts`.
        scores: floating `[num_pairs]`.

    Returns:
        `spearman` of the raw embeddings, and `spearman_whitened`: after whitening with the statistics of all these
        sentences, which uses no score (Su et al., arXiv 2103.15316).
    """
    whitening = fit_whitening(torch.cat([first, second]))
    first, second = as_array(first), as_array(second)
    raw = 1 - paired_cosine_distances(first, second)
    whitened = 1 - paired_cosine_distances(whitening.transform(first), whitening.transform(second))
    return {"spearman": spearman(raw, scores), "spearman_whitened": spearman(whitened, scores)}


def spearman(first: Any, second: Any) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank; 0 where one side is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(np.nan_to_num(spearmanr(first, second).statistic))


# --- Tasks -----------------------------------------------------------------------------------------------------------


@dataclass
class ProbeTask:
    """
    A data set to judge encoders with. `run_probing.load_tasks` makes them from files.

    Args:
        name: how its results are called.
        kind: what its columns are, see `splits`.
        splits: `"train"` and `"test"`, and where the data set has one `"validation"`, each with the columns
            `classification`: `text` (`list[str]`) and `label` (`list[int]`, from 0 up);
            `similarity`, only `"test"`: `sentence1`, `sentence2` (`list[str]`) and `score` (`list[float]`);
            `tagging`: `tokens` (`list[list[str]]`) and `tags` (`list[list[int]]`, from 0 up; -100: not judged);
            `pair order`: `sentence1`, `sentence2` (`list[str]`) and `label` (`list[int]`, from 0 up);
            `position`: `sentences` (`list[list[str]]`) and `label` (`list[int]`, from 0 up);
            `retrieval`, `"test"` and perhaps `"train"`: `title` (`list[str]`), the book of each row, and `segments`
            (`list[list[str]]`, two or more that follow each other);
            `minimal pairs`, only `"test"`: `paradigm`, `good` and `bad` (`list[str]`).
    """

    name: str
    kind: Literal["classification", "similarity", "tagging", "pair order", "position", "retrieval", "minimal pairs"]
    splits: dict[str, dict[str, list]]


Part = tuple[Any, Any]  # inputs and labels, a row each


class LabelledFeatures(NamedTuple):
    features: Tensor  # float32 [num_rows, hidden_size], a row for each text or word
    labels: Tensor  # int64 [num_rows]
    groups: Tensor  # int64 [num_rows]: rows that are held out together: of one sentence, of the same sentences, a book


class EmbeddingLayer(torch.nn.Module):
    """
    What an encoder knows before its first layer: called like an encoder, it gives the token embeddings alone. Their
    mean is a bag of words, so what an encoder knows of order is what it has beyond this.
    """

    def __init__(self, encoder: PreTrainedModel):
        super().__init__()
        self.config = encoder.config
        self.embedding = encoder.get_input_embeddings()

    def forward(self, input_ids: Tensor, **kwargs) -> BaseModelOutput:
        states = self.embedding(input_ids)
        return BaseModelOutput(last_hidden_state=states[0] if isinstance(states, tuple) else states)  # I-BERT's scale


def probe_tasks(
    model: torch.nn.Module, tokenizer, tasks: Sequence[ProbeTask], seeds: Sequence[int] = (0, 1, 2), **options
) -> dict[str, float]:
    """
    The figures of `probe_embedded_task`, of all tasks; `options` (`max_length` at least) are `embed_task`'s. The model
    may have a token head, which minimal pairs need and others do not use: without one they are left out, which is
    logged.
    """
    results, lack = {}, why_it_cannot_score(model, tokenizer)
    encoder = model.base_model if isinstance(model, PreTrainedModel) else model
    for task in tasks:
        if task.kind == MINIMAL_PAIRS and lack:
            logger.warning(f"{task.name} is left out for {type(model).__name__}: {lack}")
            continue
        judged = model if task.kind == MINIMAL_PAIRS else encoder
        results.update(probe_embedded_task(task, embed_task(judged, tokenizer, task, **options), seeds))
    return results


def embed_task(
    model: torch.nn.Module,
    tokenizer,
    task: ProbeTask,
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool | None = None,
) -> dict[str, LabelledFeatures]:
    """
    The task's splits as features and labels, every text embedded once. Of several texts in a row (the sentences of a
    pair, the segments of a passage) each is a row here, one after the other. Labels of similarity are 0, of retrieval
    the number of the passage. The only feature of minimal pairs is the score that a model with a token head gives the
    good and the bad sentence (`score_texts`). Other arguments as in `embed_texts`.
    """
    options = (max_length, batch_size, add_special_tokens)
    embedded = {}
    for split, columns in task.splits.items():
        if task.kind == "tagging":
            features, places = embed_words(model, tokenizer, columns["tokens"], *options)
            labels = torch.tensor([columns["tags"][sentence][place] for sentence, place in places.tolist()])
            is_judged = labels != IGNORED
            embedded[split] = LabelledFeatures(features[is_judged], labels[is_judged], places[is_judged, 0])
            continue
        texts, labels, groups = _texts_labels_groups(task, split)
        if task.kind == MINIMAL_PAIRS:
            features = score_texts(model, tokenizer, texts, *options)[:, None]
        else:
            numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
            features = embed_texts(model, tokenizer, list(numbers), *options)[[numbers[text] for text in texts]]
        embedded[split] = LabelledFeatures(features, torch.tensor(labels), torch.tensor(groups))
    return embedded


def groups_of_rows(task: ProbeTask, split: str) -> list[int]:
    """
    A number for each row of a split. Rows of pair order or position share it that hold the same sentences in whatever
    order, because what one of them teaches answers the others: they are to be held out together.
    """
    if task.kind in COMBINED:
        return number_equal_sets(rows_of_sentences(task.splits)[split])
    return list(range(len(next(iter(task.splits[split].values())))))


def _texts_labels_groups(task: ProbeTask, split: str) -> tuple[list[str], list[int], list[int]]:
    """For each text of a split that is not for tagging, in order."""
    columns, groups = task.splits[split], groups_of_rows(task, split)
    if task.kind == "classification":
        return columns["text"], columns["label"], groups
    labels = columns.get("label") or [0] * len(groups)
    if task.kind == RETRIEVAL:
        rows, labels, groups = columns["segments"], groups, number_equal_sets([[title] for title in columns["title"]])
    elif task.kind == MINIMAL_PAIRS:
        rows = list(zip(columns["good"], columns["bad"], strict=True))
        groups = number_equal_sets([[paradigm] for paradigm in columns["paradigm"]])
    elif task.kind == "similarity":
        rows = list(zip(columns["sentence1"], columns["sentence2"], strict=True))
    else:
        rows = rows_of_sentences(task.splits)[split]
    row_of_text = [row for row, texts in enumerate(rows) for _ in texts]
    texts = [text for row in rows for text in row]
    return texts, [labels[row] for row in row_of_text], [groups[row] for row in row_of_text]


def probe_embedded_task(
    task: ProbeTask, embedded: dict[str, LabelledFeatures], seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, float]:
    """
    The figures of a frozen encoder on one task. Each seed holds out another tenth of the training texts (of the
    sentences, for tagging), which is the validation part where the data set has none.

    Args:
        task: the data set.
        embedded: what `embed_task` made of it.
        seeds: of the held-out tenth.

    Returns:
        Means over seeds under `"{task}/{measure}"` and, with two seeds or more, their sample standard deviation under
        `"{task}/{measure}_std"`. The measures are `linear_probe` and `knn` (accuracy on the test part) for
        classification, `linear_probe` (accuracy per word) for tagging, `linear_probe` (accuracy on combined vectors,
        see `combine`) for pair order and position, those of `next_segment_figures` (of vectors whitened with the
        training part, or where there is none with the test part) for retrieval, `accuracy` (`prefers_good`) for
        minimal pairs, and those of `sts_spearman` for similarity.
    """
    if task.kind == "similarity":
        features, scores = embedded["test"].features, task.splits["test"]["score"]
        figures = sts_spearman(features[0::2], features[1::2], torch.tensor(scores, dtype=torch.float64))
        return {f"{task.name}/{measure}": figure for measure, figure in figures.items()}
    if task.kind == MINIMAL_PAIRS:
        scores, _, paradigms = embedded["test"]
        return {f"{task.name}/accuracy": prefers_good(scores[:, 0], paradigms)}
    if task.kind == RETRIEVAL:
        features, passages, books = embedded["test"]
        whitening = fit_whitening(embedded.get("train", embedded["test"]).features)
        figures = next_segment_figures(whitening.transform(as_array(features)), passages.numpy(), books.numpy())
        return {f"{task.name}/{measure}": figure for measure, figure in figures.items()}
    if task.kind in COMBINED:
        parts = {}
        for split, (features, labels, groups) in embedded.items():
            size = len(features) // len(task.splits[split]["label"])  # sentences in a row
            parts[split] = (features.unflatten(0, (-1, size)), labels[::size], groups[::size])

        def judge_combined(*parts: Part) -> dict[str, float]:
            whitening = fit_whitening(parts[0][0].flatten(0, 1))
            combined = []
            for features, labels in parts:
                sentences = [whitening.transform(as_array(vectors)) for vectors in features.unbind(1)]
                combined += [torch.from_numpy(combine(task.kind, sentences)), labels]
            return {"linear_probe": linear_probe(*combined, whiten=False).accuracy}

        return over_seeds(task, parts, seeds, judge_combined)

    def judge(train: Part, validation: Part, test: Part) -> dict[str, float]:
        figures = {"linear_probe": linear_probe(*train, *validation, *test).accuracy}
        return {**figures, "knn": knn_accuracy(*train, *test)} if task.kind == "classification" else figures

    return over_seeds(task, embedded, seeds, judge)


def probe_tasks_with_tfidf(tasks: Sequence[ProbeTask], seeds: Sequence[int] = (0, 1, 2)) -> dict[str, float]:
    """
    What `probe_embedded_task` returns, of all tasks, for a baseline that counts words: TF-IDF of words and pairs of
    words (for tagging, similarity and retrieval the word alone), combined alike, with the same classifiers, splits,
    held-out tenths and strengths. Vectors as sparse as these are not whitened: that would put all training texts at
    the same distance from each other. It cannot do what needs a token head, and knows no words of one letter.
    """
    results = {}
    for task in tasks:
        if task.kind == MINIMAL_PAIRS:
            continue
        try:
            results.update(_probe_with_tfidf(task, seeds))
        except ValueError as error:
            if "empty vocabulary" not in str(error):
                raise
            logger.warning(f"{task.name} is left out for TF-IDF: none of its texts has a word of two letters")
    return results


def _probe_with_tfidf(task: ProbeTask, seeds: Sequence[int]) -> dict[str, float]:
    if task.kind == "similarity":
        columns = task.splits["test"]
        vectorizer = TfidfVectorizer(sublinear_tf=True).fit(columns["sentence1"] + columns["sentence2"])
        first, second = (vectorizer.transform(columns[name]) for name in ("sentence1", "sentence2"))
        cosines = np.asarray(first.multiply(second).sum(axis=1)).ravel()  # of vectors of unit length
        return {f"{task.name}/spearman": spearman(cosines, columns["score"])}
    if task.kind == RETRIEVAL:
        segments, passages, books = _texts_labels_groups(task, "test")
        vectors = TfidfVectorizer(sublinear_tf=True).fit_transform(segments)
        figures = next_segment_figures(vectors, np.array(passages), np.array(books))
        return {f"{task.name}/{measure}": figure for measure, figure in figures.items()}

    def judge(*parts: Part) -> dict[str, float]:
        vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
        if task.kind == "tagging":
            vectorizer = TfidfVectorizer(analyzer=lambda word: [word])
        vectorizer.fit(parts[0][0].ravel())

        def transform(texts: np.ndarray) -> Any:
            if task.kind in COMBINED:
                return combine(task.kind, [vectorizer.transform(column) for column in texts.T])
            return vectorizer.transform(texts)

        train, validation, test = ((transform(texts), labels) for texts, labels in parts)
        # of several sentences there are so many features that each fit should start from the one before
        model = LogisticRegression(max_iter=1000, warm_start=task.kind in COMBINED)
        max_step = MAX_STRENGTH_STEP if task.kind in COMBINED else float("inf")
        probe = best_logistic_regression(model, train, validation, test, STRENGTHS, max_step)
        figures = {"linear_probe": probe.accuracy}
        if task.kind == "classification":
            figures["knn"] = make_voters(min(NUM_NEIGHBOURS, len(train[1]))).fit(*train).score(*test)
        return figures

    return over_seeds(task, {split: _texts_and_labels(task, split) for split in task.splits}, seeds, judge)


def over_seeds(
    task: ProbeTask,
    parts: dict[str, tuple],
    seeds: Sequence[int],
    judge: Callable[[Part, Part, Part], dict[str, float]],
) -> dict[str, float]:
    """The figures that `judge` gives of (inputs, labels) to train, to choose and to test with, as mean and spread."""
    inputs, labels, groups = parts["train"]
    per_seed = []
    for seed in seeds:
        is_held_out = hold_out(groups, seed).numpy()
        if len(np.unique(labels[~is_held_out])) < 2:
            raise ValueError(
                f"{task.name}: of {len(labels)} rows to train with a tenth is held out, and the others are of one "
                "class. Give more rows."
            )
        validation = parts.get("validation") or (inputs[is_held_out], labels[is_held_out])
        figures = judge((inputs[~is_held_out], labels[~is_held_out]), validation[:2], parts["test"][:2])
        per_seed.append({f"{task.name}/{measure}": figure for measure, figure in figures.items()})
    return mean_and_std(per_seed)


def hold_out(groups: Tensor, seed: int) -> Tensor:
    """A random tenth of the groups, at least one: bool, like `groups` (int64 `[num_rows]`)."""
    names = groups.unique()
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    return torch.isin(groups, names[order[: max(1, len(names) // 10)]])


def mean_and_std(per_seed: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of dictionaries with the same keys the mean and, of two or more, the sample standard deviation `{key}_std`."""
    results = {}
    for key in per_seed[0]:
        figures = torch.tensor([figure[key] for figure in per_seed], dtype=torch.float64)
        results[key] = figures.mean().item()
        if len(figures) > 1:
            results[f"{key}_std"] = figures.std().item()
    return results


def _texts_and_labels(task: ProbeTask, split: str) -> tuple[np.ndarray, np.ndarray, Tensor]:
    """Texts or words `[num_rows]`, or sentences `[num_rows, sentences of each]`, with labels and groups."""
    columns = task.splits[split]
    if task.kind == "tagging":
        sentences = enumerate(zip(columns["tokens"], columns["tags"], strict=True))
        judged = [(word, tag, i) for i, row in sentences for word, tag in zip(*row, strict=True) if tag != IGNORED]
        texts, labels, groups = zip(*judged, strict=True)
    else:
        texts = columns["text"] if task.kind == "classification" else rows_of_sentences(task.splits)[split]
        labels, groups = columns["label"], groups_of_rows(task, split)
    return np.array(texts, dtype=object), np.array(labels), torch.tensor(list(groups))
