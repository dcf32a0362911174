"""Why a document cannot be used."""

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
    if not text.strip():
        return EMPTY
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, on which tokenizers would raise
        return INVALID_UNICODE
    return None
