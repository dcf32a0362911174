"""`import tjepa` is quick, and the Auto classes know T-JEPA folders without `trust_remote_code` in whatever order."""

import subprocess
import sys

import pytest

import tjepa
from helpers import REPOSITORY


CHECK = """
def check():
    import tjepa
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForPreTraining
    from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification
    from transformers import AutoModelForTokenClassification
    assert type(AutoConfig.from_pretrained("model")) is tjepa.TJEPAConfig
    assert type(AutoModel.from_pretrained("model")) is tjepa.TJEPAModel
    assert type(AutoModelForPreTraining.from_pretrained("model")) is tjepa.TJEPAForPreTraining
    for auto, ours in (
        (AutoModelForMaskedLM, tjepa.TJEPAForMaskedLM),
        (AutoModelForQuestionAnswering, tjepa.TJEPAForQuestionAnswering),
        (AutoModelForSequenceClassification, tjepa.TJEPAForSequenceClassification),
        (AutoModelForTokenClassification, tjepa.TJEPAForTokenClassification),
    ):
        assert type(auto.from_config(tjepa.TJEPAConfig(hidden_size=32, num_attention_heads=2))) is ours
    print("registered")
"""
ORDERS = {
    "tjepa first": """
import sys, threading, tjepa
assert not {"torch", "transformers", "numpy"} & sys.modules.keys()
from transformers import AutoConfig
assert type(AutoConfig.for_model("tjepa")) is tjepa.TJEPAConfig
assert "tjepa.modeling_tjepa" not in sys.modules  # a configuration needs no model
thread = threading.Thread(target=lambda: __import__("transformers").AutoModel)
thread.start()
thread.join()
assert "tjepa.modeling_tjepa" in sys.modules
check()
""",
    "transformers first": "from transformers import AutoModel\nimport tjepa\ncheck()",
    # imports the Auto classes in the middle, and our modules need it
    "in the middle of transformers": "import tjepa\nimport transformers.modeling_layers\ncheck()",
    "in the middle of our modules": "import tjepa.layers_tjepa\ncheck()",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_auto_classes_know_tjepa(order, make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    environment = {"PYTHONPATH": str(REPOSITORY.parent), "PATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHECK + ORDERS[order]]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "registered\n", result.stderr[-2000:]


def test_names_of_the_package():
    assert all(getattr(tjepa, name).__name__ == name for name in tjepa.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'TJEPAModle'"):
        tjepa.TJEPAModle  # noqa: B018
