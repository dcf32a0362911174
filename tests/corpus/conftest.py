"""What the tests of this folder share."""

import datasets
import pytest


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of datasets for each test, so that none finds what another one has read."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
