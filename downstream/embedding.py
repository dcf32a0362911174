"""Texts and words to vectors, as a frozen encoder has them: the mean over a text's tokens, a word's first token."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedTokenizerBase

from ..corpus.tokenizers import text_reader


def embed_texts(
    model: torch.nn.Module,
    tokenizer,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
    add_special_tokens: bool | None = None,
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
        add_special_tokens: whether the tokenizer adds its own, which are tokens like any other in the mean. Default:
            as in the encoder's pretraining, see `reads_special_tokens`.

    Returns:
        float32 `[num_texts, hidden_size]` on the CPU, in the order of `texts`.

    Raises:
        ValueError: a text, or `texts` itself, is empty: the mean over no tokens does not exist.
    """
    if not len(texts):
        raise ValueError("`texts` is empty; embed_texts needs at least one text.")
    encoded = _encode(model, tokenizer, list(texts), max_length, add_special_tokens)["input_ids"]
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
    add_special_tokens: bool | None = None,
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
    encoding = _encode(model, tokenizer, [" ".join(words) for words in sentences], max_length, add_special_tokens)
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


def reads_special_tokens(config: PreTrainedConfig) -> bool:
    """
    Whether an encoder was pretrained with what its tokenizer adds to a text. T-JEPA's own architecture was not; every
    other encoder, one that T-JEPA went on pretraining included, was.
    """
    return config.model_type != "tjepa" or getattr(config, "encoder", None) is not None


def as_text_only(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """
    The tokenizer, which from now on, and when it is loaded from where it is saved, reads "</s>" in a text as these
    characters. For the folder of a model that reads texts and fills no mask.
    """
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    return tokenizer


def _encode(
    model: torch.nn.Module, tokenizer, texts: list[str], max_length: int, add_special_tokens: bool | None
) -> BatchEncoding:
    """Token ids of texts, in which nothing is read as a special token."""
    if add_special_tokens is None:
        add_special_tokens = reads_special_tokens(model.config)
    return text_reader(tokenizer)(texts, truncation=True, max_length=max_length, add_special_tokens=add_special_tokens)


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
