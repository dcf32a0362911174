"""The folder that a run leaves behind.

Of our own architecture its root holds both encoders and the predictor. Of another one, the root is what came in: a
folder of that architecture, which loads without any code of ours, beside it the modules of sentence-transformers where
there were some, and what pretraining goes on from is in `pretraining/`.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_tjepa import TJEPAConfig
from ..corpus.atomic_writes import files_in, replacing_files
from ..data_collator_tjepa import MaskingStrategy
from ..modeling_tjepa import TJEPAForPreTraining
from .arguments import PretrainingArguments


PRETRAINING_FOLDER = "pretraining"
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def save_model_folder(
    model: TJEPAForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    strategies: list[MaskingStrategy],
    args: PretrainingArguments,
    source: str | None = None,
) -> None:
    """
    Writes weights, configuration, code files, tokenizer and masking strategies to `args.output_dir`; each file there
    is the old one or the new one, never half of one.

    Args:
        args (`PretrainingArguments`): `output_dir`, and which encoder of another architecture is exported.
        source (`str`, *optional*): where an encoder of another architecture came from.
    """
    with replacing_files(args.output_dir) as root:
        folder = root if model.config.encoder is None else root / PRETRAINING_FOLDER
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        content = json.dumps([asdict(strategy) for strategy in strategies], indent=2) + "\n"
        (folder / "masking_strategies.json").write_text(content, encoding="utf-8")
        if model.config.encoder is not None:
            exported_encoder(model, args).save_pretrained(root)
            tokenizer.save_pretrained(root)
            copy_sentence_modules(source, root)


def exported_encoder(model: TJEPAForPreTraining, args: PretrainingArguments) -> PreTrainedModel:
    """The encoder that is the product of a run: the one of our own architecture that `AutoModel` loads, too."""
    return {"target": model.target_encoder, "context": model.context_encoder}[name_of_exported(model.config, args)]


def name_of_exported(config: TJEPAConfig, args: PretrainingArguments) -> str:
    """The target encoder, which is the product, unless it was frozen: then the context encoder is what was trained."""
    if config.encoder is None:
        return "target"
    is_frozen = args.ema_momentum == args.final_ema_momentum == 1.0
    return args.export_encoder or ("context" if is_frozen else "target")


def copy_sentence_modules(source: str | None, root: Path) -> None:
    """What makes a folder one of sentence-transformers: how states become a vector, which is not trained here."""
    folder = None if source is None else Path(source)
    if folder is not None and folder.name == PRETRAINING_FOLDER:
        folder = folder.parent
    for name in () if folder is None else sentence_files(folder):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, root / name)


def sentence_files(folder: Path) -> list[str]:
    """The files of a folder that are sentence-transformers', by their names in it; none where it has none."""
    if not (folder / "modules.json").is_file():
        return []
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    paths = [folder / name for name in SENTENCE_FILES if (folder / name).is_file()]
    for module in modules:
        if module["path"]:  # the encoder's own is the root
            paths += files_in(folder / module["path"])
    return [path.relative_to(folder).as_posix() for path in paths]
