"""Why a document cannot be used."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any


DROP_REASONS = (
    "null",
    "not a string",
    "empty or whitespace only",
    "invalid unicode",
    "shorter than min_tokens",
    "duplicate",
    "unreadable",
)
NULL, NOT_A_STRING, EMPTY, INVALID_UNICODE, TOO_SHORT, DUPLICATE, UNREADABLE = range(len(DROP_REASONS))
COLUMN_ADVICE = "--text_column_name names the column that holds the text."
ADVICE = {
    NULL: COLUMN_ADVICE,
    NOT_A_STRING: COLUMN_ADVICE,
    EMPTY: COLUMN_ADVICE,
    INVALID_UNICODE: "Files are read as UTF-8: convert them, as with iconv -f LATIN1 -t UTF-8.",
    TOO_SHORT: "A lower --min_tokens (2 is the lowest) keeps shorter ones.",
    DUPLICATE: "Pass --validation_split_percentage 0, or other documents as --validation_file.",
    UNREADABLE: "A jsonl file holds one JSON object a line, and in a csv file commas separate the fields and "
    "each quote is closed.",
}
KEPT = -1
DAMAGED = object()  # stands for a document that is in a file but cannot be read from it


def find_fault(text: Any) -> int | None:
    """The reason (an index into `DROP_REASONS`) why `text` cannot be tokenized, or `None` if it can."""
    if text is DAMAGED:
        return UNREADABLE
    if text is None:
        return NULL
    if not isinstance(text, str):
        return NOT_A_STRING
    # also of what nobody sees, such as zero-width spaces, of which many tokenizers make nothing
    if all(character.isspace() or unicodedata.category(character) in ("Cc", "Cf") for character in text):
        return EMPTY
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, on which tokenizers would raise
        return INVALID_UNICODE
    return None


def count_reasons(faults: Iterable[int | None]) -> Counter:
    """How many documents are left out for which reason, of what `find_fault` said, or of a column of such numbers."""
    return Counter(DROP_REASONS[fault] for fault in faults if fault not in (None, KEPT))


def list_reasons(counts: Mapping[str, int]) -> str:
    """How many documents for which reason, the commonest first, in a line."""
    return ", ".join(f"{reason} {count:,}" for reason, count in Counter(counts).most_common())


def advise(counts: Mapping[str, int]) -> str:
    """What can be done about the commonest of the reasons, if it is of `DROP_REASONS`."""
    [(reason, _)] = Counter(counts).most_common(1)
    return ADVICE[DROP_REASONS.index(reason)] if reason in DROP_REASONS else ""
