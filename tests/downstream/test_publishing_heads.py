"""Fine-tuning publishes as pretraining does: to the stand-in of hub_server.py, in this process."""

import pytest
from huggingface_hub import ModelCard

from finetuning_helpers import arguments, run
from hub_server import card_errors, hub_in_this_process


TOKEN, READING_TOKEN = "hf_thesecretofowner", "hf_thesecretforreading"
MODEL_FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture
def hub(monkeypatch):
    with hub_in_this_process({TOKEN: "owner", READING_TOKEN: "reader"}, monkeypatch) as hub:
        yield hub


def test_a_fine_tuned_model_is_published_without_any_token(hub, folder, tmp_path, monkeypatch, capfd, caplog):
    values = {"push_to_hub": True, "hub_model_id": "owner/head", "hub_token": TOKEN, "token": READING_TOKEN}
    values |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "report_to": "tensorboard"}
    values |= {"hub_strategy": "all_checkpoints", "hub_always_push": True, "test_file": folder / "test.jsonl"}
    values |= {"model_license": "apache-2.0"}
    run(monkeypatch, arguments(folder, tmp_path / "out", **values))

    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    uploaded = hub.files("owner/head")
    assert sum(path.name == "training_args.bin" for path in written) == 3  # of the folder and of both checkpoints
    assert any("tfevents" in path.name for path in written)
    for secret in (TOKEN, READING_TOKEN):
        assert secret not in "".join(capfd.readouterr()) + caplog.text
        assert not [path for path, content in written.items() if secret.encode() in content]
        assert not [path for path, content in uploaded.items() if secret.encode() in content]

    at_the_top = {path for path in uploaded if "/" not in path}
    code = {path for path in at_the_top if path.endswith("_tjepa.py")}
    assert {"configuration_tjepa.py", "modeling_tjepa.py"} <= code
    assert at_the_top - code == {".gitattributes", "README.md", *MODEL_FILES}
    assert code == {path.name for path in (tmp_path / "out").glob("*.py")}  # all that the model needs
    assert all((tmp_path / "out" / path).read_bytes() == uploaded[path] for path in at_the_top - {".gitattributes"})
    assert "checkpoint-2/optimizer.pt" in uploaded  # asked for

    content = uploaded["README.md"].decode()
    assert card_errors(content) == []
    card = ModelCard(content)
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "text-classification")
    assert 'AutoModelForSequenceClassification.from_pretrained("owner/head", trust_remote_code=True)' in card.text
    assert "test_accuracy" in {result.metric_type for result in card.data.eval_results}
    assert str(tmp_path) not in content and str(folder) not in content


def test_without_training_nothing_is_published(hub, folder, tmp_path, monkeypatch, caplog):
    run(monkeypatch, arguments(folder, tmp_path / "out", max_steps=1))
    evaluation = {"model_name_or_path": tmp_path / "out", "do_train": False, "push_to_hub": True, "hub_token": TOKEN}
    run(monkeypatch, arguments(folder, tmp_path / "figures", **evaluation, hub_model_id="owner/head"))
    assert "without training nothing is pushed" in caplog.text and not hub.repositories


def test_a_wrong_token_or_input_leaves_no_repository(hub, folder, tmp_path, monkeypatch):
    values = {"push_to_hub": True, "hub_model_id": "owner/head", "hub_token": READING_TOKEN}
    with pytest.raises(PermissionError, match="does not give access to owner/head") as error:
        run(monkeypatch, arguments(folder, tmp_path / "out", **values))
    assert READING_TOKEN not in str(error.value) and not list((tmp_path / "out").glob("*"))
    values |= {"hub_token": TOKEN, "validation_split_percentage": 0, "eval_strategy": "steps"}
    with pytest.raises(ValueError, match="there is no validation split"):
        run(monkeypatch, arguments(folder, tmp_path / "out", **values))
    assert not hub.repositories
