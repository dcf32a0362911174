"""The folder that a run leaves behind.

Of our own architecture its root holds both encoders and the predictor. Of another one, the root is what came in: a
folder of that architecture, which loads without any code of ours, beside it the modules of sentence-transformers where
there were some, and what pretraining goes on from is in `pretraining/`.
"""

import json
import logging
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..configuration_tjepa import TJEPAConfig
from ..corpus.atomic_writes import files_in, replacing_files
from ..data_collator_tjepa import MaskingStrategy
from ..modeling_tjepa import TJEPAForPreTraining
from .arguments import PretrainingArguments
from .record import read_json


logger = logging.getLogger(__name__)

PRETRAINING_FOLDER = "pretraining"
STRATEGIES_FILE = "masking_strategies.json"
ONNX_FILES = ("onnx/model.onnx", "onnx/model.onnx.data")  # the second one of a model over 2 GB, which ONNX needs
SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


def save_model_folder(
    model: TJEPAForPreTraining,
    tokenizer: PreTrainedTokenizerBase,
    strategies: list[MaskingStrategy],
    args: PretrainingArguments,
    sentence_modules: Path | None = None,
) -> None:
    """
    Writes weights, configuration, code files, tokenizer and masking strategies to `args.output_dir`; each file there
    is the old one or the new one, never half of one.

    Args:
        args (`PretrainingArguments`): `output_dir`, and which encoder of another architecture is exported.
        sentence_modules (`Path`, *optional*): what `find_sentence_modules` found.
    """
    with replacing_files(args.output_dir) as root:
        folder = root if model.config.encoder is None else root / PRETRAINING_FOLDER
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        content = json.dumps([asdict(strategy) for strategy in strategies], indent=2) + "\n"
        (folder / STRATEGIES_FILE).write_text(content, encoding="utf-8")
        if model.config.encoder is not None:
            save_encoder(model, name_of_exported(model.config, args), root)
            tokenizer.save_pretrained(root)
            for name in () if sentence_modules is None else sentence_files(sentence_modules):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(sentence_modules / name, root / name)
    # what a run that was here before left would be taken for this one's
    output_dir = Path(args.output_dir)
    if model.config.encoder is None and is_of_other_encoder(output_dir / PRETRAINING_FOLDER):
        shutil.rmtree(output_dir / PRETRAINING_FOLDER, ignore_errors=True)
    left = [] if sentence_modules is not None else sentence_files(output_dir)
    for name in [*left, *(f"onnx/{path.name}" for path in output_dir.glob("onnx/*.onnx*"))]:
        (output_dir / name).unlink()
        logger.info(f"{output_dir / name} was made before this run, and is gone: make it again from the new weights")


def save_encoder(model: TJEPAForPreTraining, which: str, folder: Path) -> None:
    """One encoder of another architecture, `"target"` or `"context"`, with the parameters that it came with."""
    encoder, drawn = getattr(model, f"{which}_encoder"), model.config.drawn_parameters or ()
    state_dict = {name: tensor for name, tensor in encoder.state_dict().items() if name not in drawn}
    encoder.save_pretrained(folder, state_dict=state_dict)


def pretraining_folder(name: str) -> str:
    """Where what pretraining goes on from is in the folder of a run: of another architecture one folder below."""
    inner = Path(name) / PRETRAINING_FOLDER
    return str(inner) if is_of_other_encoder(inner) else name


def is_of_other_encoder(folder: Path) -> bool:
    """Whether pretraining of another architecture goes on from a folder: a user's own may have the same name."""
    config = read_json(folder / "config.json") or {}
    return config.get("model_type") == TJEPAConfig.model_type and config.get("encoder") is not None


def exported_encoder(model: TJEPAForPreTraining, args: PretrainingArguments) -> PreTrainedModel:
    """The encoder that is the product of a run: the one of our own architecture that `AutoModel` loads, too."""
    return getattr(model, f"{name_of_exported(model.config, args)}_encoder")


def name_of_exported(config: TJEPAConfig, args: PretrainingArguments) -> str:
    """The target encoder, which is the product, unless it was frozen: then the context encoder is what was trained."""
    if config.encoder is None:
        return "target"
    is_frozen = args.ema_momentum == args.final_ema_momentum == 1.0
    return args.export_encoder or ("context" if is_frozen else "target")


def find_sentence_modules(name: str, revision: str, cache_dir: str | None, token: str | None) -> Path | None:
    """
    The folder with the modules of sentence-transformers that lie beside an encoder: how states become a vector, which
    is not trained here. Those of a model on the Hub are downloaded.

    Args:
        name (`str`): the encoder's folder, or a name on the Hub.
        revision, cache_dir, token: as in `from_pretrained`.
    """
    folder = Path(name)
    if not folder.is_dir():
        patterns = [*SENTENCE_FILES, "[0-9]_*/*"]
        folder = Path(
            snapshot_download(name, revision=revision, cache_dir=cache_dir, token=token, allow_patterns=patterns)
        )
    elif is_of_other_encoder(folder):  # what its pretraining goes on from, or a checkpoint
        folder = folder.parent
    return folder if sentence_files(folder) else None


def sentence_files(folder: Path) -> list[str]:
    """The files of a folder that are sentence-transformers', by their names in it; none where it has none."""
    if not (folder / "modules.json").is_file():
        return []
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    paths = [folder / name for name in SENTENCE_FILES if (folder / name).is_file()]
    for module in modules:
        if re.fullmatch(r"\d+_\w+", module["path"]):  # the encoder's own is the root; any other is not one of theirs
            paths += files_in(folder / module["path"])
    return [path.relative_to(folder).as_posix() for path in paths]
