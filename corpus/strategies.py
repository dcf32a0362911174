"""Masking strategies by the name of a preset, or from a YAML or JSON file."""

import json
from pathlib import Path

import yaml

from ..data_collator_tjepa import MASKING_PRESETS, MaskingStrategy


def load_masking_strategies(name_or_path: str | Path) -> list[MaskingStrategy]:
    """
    A preset by name (`"ul2"`), or a list of strategies from a YAML or JSON file; a `ValueError` if it is neither, or
    if the file does not hold a non-empty list of valid strategies.
    """
    if str(name_or_path) in MASKING_PRESETS:
        return list(MASKING_PRESETS[str(name_or_path)])
    path = Path(name_or_path)
    if not path.is_file() or path.suffix not in (".yaml", ".yml", ".json"):
        allowed = f"a preset ({', '.join(MASKING_PRESETS)}) or an existing .yaml, .yml or .json file"
        raise ValueError(f"masking_strategies must be {allowed}, got {str(name_or_path)!r}.")
    text = path.read_text(encoding="utf-8")
    try:
        strategies = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if not isinstance(strategies, list) or not strategies:
            raise ValueError(f"must hold a list of masking strategies, got {type(strategies).__name__}.")
        return [MaskingStrategy.from_dict(strategy) for strategy in strategies]
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"masking_strategies {path}: {error}") from error
