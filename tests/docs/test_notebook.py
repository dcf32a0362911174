"""The notebook runs from its first cell to its last, at tiny size."""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from helpers import REPOSITORY, TINY


NOTEBOOK = REPOSITORY / "notebooks" / "quickstart.ipynb"
IN_COLAB = "https://colab.research.google.com/github/t-jepa/t-jepa/blob/main/notebooks/quickstart.ipynb"


@pytest.fixture
def notebook():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_it_opens_in_colab_and_installs_first(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert IN_COLAB in notebook.cells[0].source
    assert "%pip install -q tjepa" in code[0].source and "tjepa" not in "".join(cell.source for cell in code[1:2])
    assert not any(cell.outputs or cell.execution_count for cell in code)


def test_it_runs(notebook, inputs, tmp_path, monkeypatch):
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    flags = f"configs/default.yaml --train_file {inputs}/train.jsonl --tokenizer_name {inputs}/tokenizer"
    flags += f" --max_steps 2 --max_length 64 --config_overrides {TINY} --do_eval False --eval_strategy no"
    flags += " --save_strategy no"
    parameters.source = f"FLAGS, TEXTS = {flags!r}, {str(inputs / 'train.jsonl')!r}"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    script = tmp_path / "tjepa"  # the one that an installation makes
    script.write_text('#!/bin/sh\nexec python -m tjepa.cli "$@"\n')
    script.chmod(0o755)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" not in output]
    printed = "".join(output["text"] for output in printed if output.get("name") == "stdout")
    assert (tmp_path / "runs" / "quickstart" / "model.safetensors").is_file(), printed
    assert "torch.Size([2, 32])" in str(notebook.cells), printed
    assert "hidden: '" in printed and "guesses: ['" in printed, printed
    hits = re.findall(r"^-?\d\.\d\d .* (?:fox|hen|night)", printed, flags=re.M)
    assert len(hits) == 5, printed
