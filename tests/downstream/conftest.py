"""The folder that the tests of fine-tuning start from, made once."""

from pathlib import Path

import pytest

from finetuning_helpers import make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("finetuning"))
