"""How a frozen encoder is judged, one way everywhere: mean-pool, whiten, logistic regression, accuracy.

Whitening is not a detail. Trained encoders keep much of what they know in directions of small variance, which a
regularised probe on the raw features never uses; without whitening an untrained encoder can win by default.
The statistics come from the probe's training part alone, the strength from its validation part, the verdict from its
test part. Everything after the encoder runs on the CPU in float64: small, deterministic, and free of scikit-learn
(but for the TF-IDF baseline, which is scikit-learn's).

Top to bottom: texts and words to vectors, whitening, the probe, neighbours, and on these the tasks: `probe_tasks` for
an encoder and `probe_tasks_with_tfidf` for the baseline give the same keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


# scikit-learn's C, in half decades. From strong to weak, so that each fit starts near its optimum.
STRENGTHS = tuple(10 ** (exponent / 2) for exponent in range(-8, 5))
MAX_STRENGTH_STEP = 150  # two decades, and room for rounding
NUM_NEIGHBOURS = 10


class ProbeResult(NamedTuple):
    accuracy: float  # on the test part
    strength: float  # scikit-learn's C, chosen on the validation part
    validation_accuracy: float  # at that strength: the maximum of a search, so a little optimistic


def embed_texts(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool = False,
) -> Tensor:
    """
    One vector per text: the mean of the last hidden state over the text's tokens.

    Args:
        model: any transformers encoder, called with `input_ids` and `attention_mask`, int64 `[batch, length]`. It runs
            where its parameters are, in eval mode, and gets its training flags back.
        tokenizer: any transformers tokenizer; it needs no padding token.
        texts: sequence of `num_texts` strings.
        max_length: texts are cut off after this many tokens.
        batch_size: texts per forward.
        add_special_tokens: whether the tokenizer adds its own, as BERT expects; T-JEPA is trained without. They
            are tokens like any other in the mean.

    Returns:
        float32 `[num_texts, hidden_size]` on the CPU, in the order of `texts`.

    Raises:
        ValueError: a text, or `texts` itself, is empty: the mean over no tokens does not exist.
    """
    if not len(texts):
        raise ValueError("`texts` is empty; embed_texts needs at least one text.")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, add_special_tokens=add_special_tokens)[
        "input_ids"
    ]
    lengths = [len(ids) for ids in encoded]
    if 0 in lengths:
        raise ValueError(
            f"Text {lengths.index(0)} of {len(texts)} has no tokens: {texts[lengths.index(0)]!r}. Every text needs at "
            "least one; drop empty texts, or pass add_special_tokens=True if the tokenizer has special tokens."
        )
    features, order = [], []

    def pool(indices: list[int], hidden: Tensor, mask: Tensor) -> None:
        # masked_fill, not a product: whatever a padded position holds, NaN included, stays out
        hidden = hidden.masked_fill(mask[..., None] == 0, 0.0)  # [batch, length, hidden]
        features.append((hidden.sum(1) / mask.sum(1, keepdim=True)).cpu())  # [batch, hidden]
        order.extend(indices)

    _for_hidden_states(model, encoded, batch_size, pool)
    return torch.cat(features)[torch.tensor(order).argsort()].clone()


def embed_words(
    model: torch.nn.Module,
    tokenizer,
    sentences: Sequence[Sequence[str]],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    One vector per word, for probes of tagging: the last hidden state of the word's first token. A sentence is read as
    its words with a space between them, which is how encoders meet words in running text.

    Args:
        model, max_length, batch_size, add_special_tokens: as in `embed_texts`.
        tokenizer: a fast tokenizer (it must know which character each token comes from).
        sentences: the words of each sentence.

    Returns:
        float32 `[num_words, hidden_size]` and int64 `[num_words, 2]`: sentence and place in it of each word, in order.
        Words that have no token (beyond `max_length`, empty, removed by the tokenizer) are not among them.

    Raises:
        ValueError: the tokenizer is not a fast one, or no word has a token.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where its tokens come from; use a fast tokenizer.")
    encoding = tokenizer(
        [" ".join(words) for words in sentences],
        truncation=True,
        max_length=max_length,
        add_special_tokens=add_special_tokens,
    )
    tokens_of_sentence, found = [], []
    for sentence, words in enumerate(sentences):
        start, tokens = 0, []
        for place, word in enumerate(words):
            token = encoding.char_to_token(sentence, start) if word else None
            start += len(word) + 1
            if token is not None:
                found.append((sentence, place))
                tokens.append(token)
        tokens_of_sentence.append(torch.tensor(tokens, dtype=torch.long))
    if not found:
        raise ValueError(f"None of the words of {len(sentences)} sentences has a token: there is nothing to embed.")
    kept = [sentence for sentence, tokens in enumerate(tokens_of_sentence) if len(tokens)]
    features = {}

    def pick(indices: list[int], hidden: Tensor, mask: Tensor) -> None:
        for sentence, states in zip((kept[index] for index in indices), hidden.cpu(), strict=True):
            features[sentence] = states[tokens_of_sentence[sentence]]  # [words, hidden]

    _for_hidden_states(model, [encoding["input_ids"][sentence] for sentence in kept], batch_size, pick)
    return torch.cat([features[sentence] for sentence in kept]).clone(), torch.tensor(found)


def _for_hidden_states(model: torch.nn.Module, encoded: Sequence[list[int]], batch_size: int, use: Callable) -> None:
    """Calls `use(indices into encoded, hidden states float32 [batch, length, hidden], mask [batch, length])`."""
    device = next(model.parameters()).device
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # like lengths: little padding
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(encoded), batch_size):
                indices = by_length[start : start + batch_size]
                ids = [torch.tensor(encoded[index]) for index in indices]
                input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # [batch, length], padded with 0
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
                input_ids, mask = input_ids.to(device), mask.to(device)
                use(indices, model(input_ids=input_ids, attention_mask=mask).last_hidden_state.float(), mask)
    finally:
        for module, was_training in training_flags:  # one by one: a part may be in eval mode for good
            module.training = was_training


def fit_whitening(train_features: Tensor) -> tuple[Tensor, Tensor]:
    """
    Centring and PCA whitening: `whiten` gives the training features mean 0 and covariance I (over N, not N - 1).

    Args:
        train_features: floating `[num_texts, hidden_size]`.

    Returns:
        mean `[hidden_size]` and projection `[hidden_size, rank]`, float64: the eigenvectors of the covariance divided
        by the roots of their eigenvalues. Directions whose variance is float32 rounding are dropped (rank 0 if
        all features are equal).
    """
    features = train_features.double()
    mean = features.mean(0)
    centred = features - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    # Features were computed in float32, so their rounding is relative to their size, the mean included.
    rounding = len(mean) * torch.finfo(torch.float32).eps
    kept = variances > rounding**2 * (variances.max() + mean.square().max())
    return mean, directions[:, kept] / variances[kept].sqrt()


def whiten(features: Tensor, mean: Tensor, projection: Tensor) -> Tensor:
    """`(features - mean) @ projection`: `[num_texts, hidden_size]` to float64 `[num_texts, rank]`."""
    return (features.double() - mean) @ projection


def fit_logistic_regression(
    features: Tensor, labels: Tensor, num_classes: int, strength: float, start: Tensor | None = None
) -> Tensor:
    """
    Multinomial logistic regression by full-batch L-BFGS, in float64. It minimises, over N texts,

        1/N · Σ_i cross_entropy(W x_i + b, y_i)  +  ‖W‖² / (2 · C · N)        with b not regularised,

    which is scikit-learn's `LogisticRegression(C=C)`: the same optimum for the same C.

    Args:
        features: floating `[num_texts, width]`.
        labels: int64 `[num_texts]`, each in `[0, num_classes)`.
        num_classes: number of classes.
        strength: C; the larger, the weaker the regularisation.
        start: weights to begin from, as returned here; zeros by default.

    Returns:
        float64 `[num_classes, width + 1]`: W, and b in the last column. Logits are `x @ W.T + b`.

    Raises:
        ValueError: features and labels differ in number, a label is out of range, or the strength is not positive.
    """
    if len(features) != len(labels):
        raise ValueError(f"{len(features)} features but {len(labels)} labels; every row of features needs one label.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels go from {labels.min()} to {labels.max()}, but num_classes={num_classes} allows 0 to "
            f"{num_classes - 1}; renumber the labels or raise num_classes."
        )
    if not strength > 0:
        raise ValueError(f"strength is {strength}; it must be positive (scikit-learn's C, for example 0.01).")
    features = features.double()
    weights = torch.zeros(num_classes, features.shape[1] + 1, dtype=torch.float64) if start is None else start.clone()
    weights.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = weights[:, :-1].square().sum() / (2 * strength * len(labels))
        loss = F.cross_entropy(_logits(features, weights), labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weights.detach()


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
        `ProbeResult`. Of equally good strengths the one that regularises most; the search ends two decades beyond it.
    """
    mean, projection = fit_whitening(train)
    if not whiten:
        projection = torch.eye(len(mean), dtype=torch.float64)
    train, validation, test = ((part.double() - mean) @ projection for part in (train, validation, test))
    num_classes = int(torch.cat([train_labels, validation_labels, test_labels]).max()) + 1
    weights, best = None, None
    for strength in STRENGTHS:
        if best is not None and strength > MAX_STRENGTH_STEP * best.strength:
            break  # the weakly regularised fits take longest, and here they only overfit more
        weights = fit_logistic_regression(train, train_labels, num_classes, strength, start=weights)
        validation_accuracy = _accuracy(validation, validation_labels, weights)
        if best is None or validation_accuracy > best.validation_accuracy:
            best = ProbeResult(_accuracy(test, test_labels, weights), strength, validation_accuracy)
    return best


def nearest_neighbours(query_features: Tensor, corpus_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """
    The `k` texts of the corpus nearest to each query, by cosine after the corpus's mean is taken off (the mean is most
    of what two raw features share). For whitened neighbours pass both through `whiten` first.

    Args:
        query_features: floating `[num_queries, hidden_size]`.
        corpus_features: floating `[num_texts, hidden_size]`.
        k: neighbours per query, at most `num_texts`.

    Returns:
        cosines float64 `[num_queries, k]`, the largest first, and int64 indices into the corpus, same shape.

    Raises:
        ValueError: `k` is not between 1 and the size of the corpus.
    """
    if not 1 <= k <= len(corpus_features):
        raise ValueError(f"k is {k}, but the corpus has {len(corpus_features)} texts; choose k from 1 to that.")
    mean = corpus_features.double().mean(0)
    queries, corpus = (F.normalize(part.double() - mean, dim=1) for part in (query_features, corpus_features))
    return tuple((queries @ corpus.T).topk(k, dim=1))


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
    mean, projection = fit_whitening(train)
    corpus, num_classes = whiten(train, mean, projection), int(train_labels.max()) + 1
    predicted = []
    for queries in whiten(test, mean, projection).split(1024):  # all cosines at once may not fit into memory
        cosines, neighbours = nearest_neighbours(queries, corpus, min(k, len(corpus)))
        votes = F.one_hot(train_labels[neighbours], num_classes) * cosines.unsqueeze(-1)  # [queries, k, classes]
        predicted.append(votes.sum(1).argmax(1))
    return (torch.cat(predicted) == test_labels).double().mean().item()


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
    mean, projection = fit_whitening(torch.cat([first, second]))
    whitened = F.cosine_similarity(whiten(first, mean, projection), whiten(second, mean, projection))
    raw = F.cosine_similarity(first.double(), second.double())
    return {"spearman": spearman(raw, scores), "spearman_whitened": spearman(whitened, scores)}


def spearman(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation of two vectors, ties sharing their mean rank; 0 where one side is constant."""
    ranks = torch.stack([_ranks(first), _ranks(second)])
    return torch.corrcoef(ranks)[0, 1].nan_to_num(0.0).item()


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
            `tagging`: `tokens` (`list[list[str]]`) and `tags` (`list[list[int]]`, from 0 up).
    """

    name: str
    kind: Literal["classification", "similarity", "tagging"]
    splits: dict[str, dict[str, list]]


class LabelledFeatures(NamedTuple):
    features: Tensor  # float32 [num_rows, hidden_size], a row for each text or word
    labels: Tensor  # int64 [num_rows]
    groups: Tensor  # int64 [num_rows]: the text or sentence that a row comes from


def probe_tasks(
    model: torch.nn.Module,
    tokenizer,
    tasks: Sequence[ProbeTask],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, float]:
    """
    Judges a frozen encoder. Every text is embedded once; each seed then holds out another tenth of the training texts
    (of the sentences, for tagging), which is the validation part where the data set has none.

    Args:
        model, tokenizer, max_length, batch_size, add_special_tokens: as in `embed_texts`.
        tasks: the data sets.
        seeds: of the held-out tenth.

    Returns:
        Means over seeds under `"{task}/{measure}"` and, with two seeds or more, their sample standard deviation under
        `"{task}/{measure}_std"`. The measures are `linear_probe` and `knn` (accuracy on the test part) for
        classification, `linear_probe` (accuracy per word) for tagging, and those of `sts_spearman` for similarity.
    """
    results = {}
    for task in tasks:
        embedded = embed_task(model, tokenizer, task, max_length, batch_size, add_special_tokens)
        results.update(probe_embedded_task(task, embedded, seeds))
    return results


def embed_task(
    model: torch.nn.Module,
    tokenizer,
    task: ProbeTask,
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool = False,
) -> dict[str, LabelledFeatures]:
    """
    The task's splits as features and labels. Of similarity the two sentences of a pair are two rows, one after the
    other, whose label is 0. Arguments as in `probe_tasks`.
    """
    options = (max_length, batch_size, add_special_tokens)
    embedded = {}
    for split, columns in task.splits.items():
        if task.kind == "tagging":
            features, places = embed_words(model, tokenizer, columns["tokens"], *options)
            labels = torch.tensor([columns["tags"][sentence][place] for sentence, place in places.tolist()])
            embedded[split] = LabelledFeatures(features, labels, places[:, 0])
            continue
        texts, labels = columns.get("text"), columns.get("label")
        if task.kind == "similarity":
            texts = [text for pair in zip(columns["sentence1"], columns["sentence2"], strict=True) for text in pair]
            labels = [0] * len(texts)
        features = embed_texts(model, tokenizer, texts, *options)
        embedded[split] = LabelledFeatures(features, torch.tensor(labels), torch.arange(len(features)))
    return embedded


def probe_embedded_task(
    task: ProbeTask, embedded: dict[str, LabelledFeatures], seeds: Sequence[int] = (0, 1, 2)
) -> dict[str, float]:
    """What `probe_tasks` returns for one task, from what `embed_task` gave."""
    test = embedded["test"]
    if task.kind == "similarity":
        scores = torch.tensor(task.splits["test"]["score"], dtype=torch.float64)
        figures = sts_spearman(test.features[0::2], test.features[1::2], scores)
        return {f"{task.name}/{measure}": figure for measure, figure in figures.items()}
    per_seed = []
    for seed in seeds:
        is_held_out = hold_out(embedded["train"].groups, seed)
        train = LabelledFeatures(*(column[~is_held_out] for column in embedded["train"]))
        validation = embedded.get("validation") or LabelledFeatures(*(part[is_held_out] for part in embedded["train"]))
        probe = linear_probe(*train[:2], *validation[:2], *test[:2])
        per_seed.append({f"{task.name}/linear_probe": probe.accuracy})
        if task.kind == "classification":
            per_seed[-1][f"{task.name}/knn"] = knn_accuracy(*train[:2], *test[:2])
    return mean_and_std(per_seed)


def probe_tasks_with_tfidf(tasks: Sequence[ProbeTask], seeds: Sequence[int] = (0, 1, 2)) -> dict[str, float]:
    """
    What `probe_tasks` returns, for a baseline that counts words: TF-IDF of words and pairs of words (for tagging the
    word alone) and scikit-learn's logistic regression, with the same splits, held-out tenths and strengths. Vectors as
    sparse as these are not whitened: that would put all training texts at the same distance from each other.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    results = {}
    for task in tasks:
        if task.kind == "similarity":
            columns = task.splits["test"]
            vectorizer = TfidfVectorizer(sublinear_tf=True).fit(columns["sentence1"] + columns["sentence2"])
            first, second = (vectorizer.transform(columns[name]) for name in ("sentence1", "sentence2"))
            cosines = torch.from_numpy(first.multiply(second).sum(axis=1)).flatten()  # of vectors of unit length
            results[f"{task.name}/spearman"] = spearman(cosines, torch.tensor(columns["score"], dtype=torch.float64))
            continue
        parts = {split: _texts_and_labels(task, columns) for split, columns in task.splits.items()}
        texts, labels, groups = parts["train"]
        per_seed = []
        for seed in seeds:
            is_held_out = hold_out(groups, seed).numpy()
            vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2))
            if task.kind == "tagging":
                vectorizer = TfidfVectorizer(analyzer=lambda word: [word])
            train, train_labels = vectorizer.fit_transform(texts[~is_held_out]), labels[~is_held_out]
            validation_texts, validation_labels, _ = parts.get(
                "validation", (texts[is_held_out], labels[is_held_out], None)
            )
            validation, test = vectorizer.transform(validation_texts), vectorizer.transform(parts["test"][0])
            best = (-1.0, None)
            for strength in STRENGTHS:
                model = LogisticRegression(C=strength, max_iter=1000).fit(train, train_labels)
                accuracy = model.score(validation, validation_labels)
                if accuracy > best[0]:
                    best = (accuracy, model)
            per_seed.append({f"{task.name}/linear_probe": best[1].score(test, parts["test"][1])})
            if task.kind == "classification":
                voters = KNeighborsClassifier(min(NUM_NEIGHBOURS, len(train_labels)), metric="cosine")
                per_seed[-1][f"{task.name}/knn"] = voters.fit(train, train_labels).score(test, parts["test"][1])
        results.update(mean_and_std(per_seed))
    return results


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


def _texts_and_labels(task: ProbeTask, columns: dict[str, list]) -> tuple[np.ndarray, np.ndarray, Tensor]:
    if task.kind == "classification":
        texts, labels, groups = columns["text"], columns["label"], range(len(columns["text"]))
    else:
        texts = [word for words in columns["tokens"] for word in words]
        labels = [tag for tags in columns["tags"] for tag in tags]
        groups = [sentence for sentence, words in enumerate(columns["tokens"]) for _ in words]
    return np.array(texts, dtype=object), np.array(labels), torch.tensor(list(groups))


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse].double()


def _logits(features: Tensor, weights: Tensor) -> Tensor:
    return F.linear(features, weights[:, :-1], weights[:, -1])


def _accuracy(features: Tensor, labels: Tensor, weights: Tensor) -> float:
    return (_logits(features, weights).argmax(1) == labels).double().mean().item()
