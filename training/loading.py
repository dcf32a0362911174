"""The configuration of a run, as flags change it."""

import yaml

from ..configuration_tjepa import TJEPAConfig


def parse_config_overrides(overrides: str | None) -> dict:
    """`"hidden_size=128,use_bias=false"` as a mapping with typed values."""
    if not overrides:
        return {}
    pairs = [pair.split("=", 1) for pair in overrides.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"--config_overrides is a list such as hidden_size=128,num_hidden_layers=4, got {overrides!r}."
        )
    values = {name.strip(): yaml.safe_load(value) for name, value in pairs}
    if unknown := sorted(set(values) - set(TJEPAConfig().to_dict())):
        raise ValueError(f"--config_overrides: TJEPAConfig has no {unknown}; see configuration_tjepa.py.")
    return values
