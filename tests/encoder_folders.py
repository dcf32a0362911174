"""A tiny encoder of another architecture as a stock folder, with the tokenizer and the modules around it."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from encoder_families import make_encoder
from helpers import WORDS, make_word_tokenizer


MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


def make_tokenizer(**special_tokens) -> PreTrainedTokenizerFast:
    """Words, between [CLS] and [SEP]."""
    names = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"]
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    special |= {"mask_token": "[MASK]", **special_tokens}
    special = {name: token for name, token in special.items() if token}
    return make_word_tokenizer([*names, *WORDS], model_max_length=64, **special)


def make_folder(folder: Path, model_type: str = "bert", **special_tokens) -> Path:
    """A stock folder, as sentence-transformers has it."""
    make_encoder(model_type).save_pretrained(folder)
    make_tokenizer(**special_tokens).save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps(MODULES))
    (folder / "config_sentence_transformers.json").write_text('{"similarity_fn_name": "cosine"}')
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": false}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(POOLING))
    return folder
