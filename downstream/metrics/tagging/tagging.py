"""Accuracy of tags, and precision, recall and F1 of the chunks that they spell, as an `evaluate` module.

    evaluate.load("downstream/metrics/tagging").compute(predictions=[["B-NP", "O"]], references=[["B-NP", "I-NP"]])

For machines that cannot reach the Hub, where `evaluate.load("seqeval")` lives, or lack the package it needs. Notable:
the chunks are those of the CoNLL-2000 script `conlleval`, which seqeval's default follows, too. One import per line:
`evaluate` reads these lines with a simple parser to find out what a module needs.
"""

import datasets
import evaluate


_DESCRIPTION = "Token accuracy and chunk precision, recall and F1 of tag sequences, without network or packages."
_CITATION = ""
_KWARGS_DESCRIPTION = """
Args:
    predictions, references (`list[list[str]]`): the tags of each sentence, one for each word: B-X begins a chunk of
        type X, I-X goes on with it, O is outside; or with E-X for the last word of a chunk and S-X for a single one.

Returns:
    accuracy: the share of words whose tag is right.
    precision, recall, f1: a chunk is right when its first word, its last word and its type are (Tjong Kim Sang and
        Buchholz, "Introduction to the CoNLL-2000 Shared Task: Chunking", 2000), counted over all sentences: hits /
        predicted chunks, hits / true chunks, and 2 hits / (predicted + true). A chunk may also begin with I-X, after O
        or after another type. 0 where there are no chunks. Left out where no tag of the references has a prefix.

Raises:
    ValueError: for no words, or sentences whose numbers of tags differ.
"""
_PREFIXES = ("B-", "I-", "E-", "S-")


class Tagging(evaluate.Metric):
    def _info(self):
        sentences = datasets.List(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": sentences, "references": sentences}),
        )

    def _compute(self, predictions, references):
        num_words = sum(map(len, references))
        if num_words == 0:
            raise ValueError("There are no words to compute a metric of.")
        right_words = hits = num_predicted = num_true = 0
        for index, (predicted_tags, true_tags) in enumerate(zip(predictions, references, strict=True)):
            if len(predicted_tags) != len(true_tags):
                raise ValueError(
                    f"Sentence {index} has {len(predicted_tags)} predicted tags and {len(true_tags)} true ones: give "
                    "one of each for every word."
                )
            right_words += sum(map(str.__eq__, predicted_tags, true_tags))
            predicted, true = _chunks(predicted_tags), _chunks(true_tags)
            hits += len(predicted & true)
            num_predicted += len(predicted)
            num_true += len(true)
        results = {"accuracy": right_words / num_words}
        if any(tag.startswith(_PREFIXES) for tags in references for tag in tags):
            results["precision"] = hits / max(1, num_predicted)
            results["recall"] = hits / max(1, num_true)
            results["f1"] = 2 * hits / max(1, num_predicted + num_true)
        return results


def _chunks(tags):
    """The chunks of one sentence as a set of (first word, word after the last, type)."""
    chunks, start, previous_prefix, previous_type = set(), None, "O", ""
    for index, tag in enumerate([*tags, "O"]):  # the last O closes what is open
        prefix, type_ = (tag[0], tag[2:]) if tag.startswith(_PREFIXES) else ("O", "")
        begins = prefix in "BS" or previous_prefix in "ES" or type_ != previous_type
        if start is not None and (prefix == "O" or begins):
            chunks.add((start, index, previous_type))
            start = None
        if prefix != "O" and (start is None or begins):
            start = index
        previous_prefix, previous_type = prefix, type_
    return chunks
