"""What the quickstart prints at its end: what the frozen encoder knows about unseen docstrings."""

import torch
from datasets import Dataset
from sklearn.neighbors import NearestNeighbors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..corpus.quickstart import PACKAGES, load_quickstart_documents
from .embedding import embed_texts
from .probe import linear_probe
from .whitening import as_array, fit_whitening


NUM_PROBE_DOCUMENTS = 6000  # the probe trains on so many of the training documents
NUM_QUERIES = 4


def report_what_was_learned(
    encoder: PreTrainedModel,
    untrained_encoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | None = None,
) -> dict[str, float]:
    """
    Prints what the frozen encoder knows about docstrings it never saw: the probe that tells their library from the
    embedding, for the trained and for the untrained encoder, and the nearest neighbours of a few of them.

    Args:
        encoder, untrained_encoder: after and before training.
        tokenizer: of both; they read `model_max_length` tokens of a docstring, as in pretraining.
        cache_dir: where the quickstart's corpus is kept.

    Returns:
        `probe_accuracy` and `probe_accuracy_untrained`, in [0, 1].
    """
    documents = load_quickstart_documents(cache_dir)
    known = documents["train"].select(range(min(NUM_PROBE_DOCUMENTS, len(documents["train"]))))
    new = documents["validation"]
    middle = len(new) // 2  # the first half chooses the probe's strength, the second half judges it
    known_labels, new_labels = (torch.tensor(part["label"][:]) for part in (known, new))
    accuracy = {}
    for name, candidate in (("untrained", untrained_encoder), ("trained", encoder)):
        known_features, new_features = (
            embed_texts(candidate, tokenizer, part["text"][:], tokenizer.model_max_length) for part in (known, new)
        )
        accuracy[name] = linear_probe(
            known_features,
            known_labels,
            new_features[:middle],
            new_labels[:middle],
            new_features[middle:],
            new_labels[middle:],
        ).accuracy

    print("\nWhat was learned")
    most_frequent = new_labels[middle:].bincount().max() / (len(new) - middle)
    print(
        f"  Which of {len(PACKAGES)} libraries does an unseen docstring come from? A linear probe on the frozen\n"
        f"  encoder's mean vector is right for {accuracy['trained']:.1%} of {len(new) - middle:,} docstrings.\n"
        f"  On the same encoder before training it is right for {accuracy['untrained']:.1%}; always naming the most\n"
        f"  frequent library is right for {most_frequent:.1%}."
    )
    print("  Unseen docstrings, and their nearest neighbours among the training docstrings:")
    whitening = fit_whitening(known_features)
    known_directions, new_directions = (whitening.transform(as_array(part)) for part in (known_features, new_features))
    queries = torch.linspace(0, len(new) - 1, NUM_QUERIES).long()
    nearest = NearestNeighbors(n_neighbors=2, metric="cosine").fit(known_directions)
    distances, neighbours = nearest.kneighbors(new_directions[queries])
    for query, query_distances, query_neighbours in zip(queries.tolist(), distances, neighbours, strict=True):
        print(f"\n    {_beginning(new, query)}")
        for distance, neighbour in zip(query_distances.tolist(), query_neighbours.tolist(), strict=True):
            print(f"      {1 - distance:.2f}  {_beginning(known, neighbour)}")
    print()
    return {"probe_accuracy": accuracy["trained"], "probe_accuracy_untrained": accuracy["untrained"]}


def _beginning(documents: Dataset, index: int) -> str:
    document = documents[index]
    library = documents.features["label"].int2str(document["label"])
    return f"[{library}] {' '.join(document['text'].split())[:90]}"
