"""Private names of datasets, accelerate, transformers: each is still there, and none is used elsewhere."""

import ast

import datasets
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from transformers import PreTrainedModel, Trainer
from transformers.core_model_loading import WeightRenaming

from helpers import REPOSITORY, make_tiny_config
from tjepa import TJEPAForPreTraining, TJEPAModel
from tjepa.corpus.private import (
    get_attention,
    has_shuffle_buffer,
    initialise,
    set_attention,
    without_repeated_documents,
)


def make_stream() -> datasets.IterableDataset:
    return datasets.Dataset.from_dict({"input_ids": [[1], [2]] * 20}).to_iterable_dataset(num_shards=2)


def test_ex_iterable_of_datasets_tells_of_a_shuffle_buffer():
    plain, shuffled = make_stream(), make_stream().shuffle(seed=1, buffer_size=8)
    assert not has_shuffle_buffer(plain) and has_shuffle_buffer(shuffled)
    assert has_shuffle_buffer(shuffled.map(lambda row: row).filter(lambda row: True).take(3))
    assert has_shuffle_buffer(datasets.concatenate_datasets([plain, shuffled]))
    assert not has_shuffle_buffer(datasets.interleave_datasets([plain, plain]).shard(2, 0))


def test_get_grad_norm_of_the_trainer():
    assert callable(Trainer._get_grad_norm)


def test_attn_implementation_of_a_config():
    config = make_tiny_config()
    set_attention(config, "eager")
    assert get_attention(config) == "eager" == get_attention(TJEPAForPreTraining(config).config)


def test_init_weights_of_a_model():
    model = TJEPAModel(make_tiny_config(initializer_range=0.5))
    part = torch.nn.Linear(200, 200)
    initialise(model, part)
    assert part.weight.std().item() == pytest.approx(0.5, abs=0.02) and not part.bias.any()


def test_classes_of_accelerate_that_are_exchanged():
    assert {"_iter_with_no_split", "__iter__", "__len__"} <= set(dir(BatchSamplerShard))
    batches = torch.utils.data.BatchSampler(range(7), 2, drop_last=False)
    loader = torch.utils.data.DataLoader(range(7), batch_sampler=BatchSamplerShard(batches, 2, 1))
    assert list(without_repeated_documents(loader).batch_sampler) == [[2, 3], [6]]
    assert [list(batch) for batch in BatchSamplerShard(batches, 2, 0)] == [[0, 1], [4, 5]]
    stream = IterableDatasetShard(range(3), batch_size=1, num_processes=2, process_index=1)
    assert list(without_repeated_documents(torch.utils.data.DataLoader(stream)).dataset) == [1, None]


@pytest.mark.parametrize(
    "name",
    ["_init_weights", "_no_split_modules", "_supports_sdpa", "_supports_flex_attn", "_supports_flash_attn"]
    + ["_supports_attention_backend", "_keys_to_ignore_on_load_unexpected", "_tied_weights_keys"],
)
def test_names_that_the_model_files_use(name):
    assert hasattr(PreTrainedModel, name)


def test_weight_conversions_of_a_loaded_model(tmp_path, monkeypatch):
    """`from_pretrained` leaves there what it renamed, and `modeling_tjepa.py` looks for it."""
    TJEPAForPreTraining(make_tiny_config()).save_pretrained(tmp_path)
    assert hasattr(WeightRenaming, "was_used")
    model = PreTrainedModel.from_pretrained.__func__(TJEPAModel, tmp_path, key_mapping={"^target_encoder.": ""})
    assert any(conversion.was_used() for conversion in model._weight_conversions)


# What begins with an underscore and is public all the same (named tuples, exits), or torch's (fused operations)
PUBLIC = {"_replace", "_asdict", "_exit", "_foreach_mul_", "_foreach_add_"}
PARTS_OF_THE_MODEL = ("configuration", "layers", "encoders", "predictors", "losses", "modeling")
EXEMPT = {"private.py", *(f"{name}_tjepa.py" for name in PARTS_OF_THE_MODEL)}
SHIPPED = [
    path
    for path in sorted(REPOSITORY.rglob("*.py"))
    if path.relative_to(REPOSITORY).parts[0] not in ("tests", "build", ".venv", "docs", "benchmarks")
    and path.name not in EXEMPT
]


def private_names(path) -> list[str]:
    """Private attributes of objects of other libraries, and methods that override a private one of the Trainer."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    methods = [item for node in nodes if isinstance(node, ast.ClassDef) and node.bases for item in node.body]
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    found = [
        f"line {method.lineno}: {method.name} is the Trainer's"
        for method in methods
        if isinstance(method, ast.FunctionDef)
        and method.name.startswith("_")
        and not method.name.endswith("__")
        and hasattr(Trainer, method.name)
    ]
    for node in attributes:
        is_private = node.attr.startswith("_") and not node.attr.endswith("__") and node.attr not in PUBLIC
        is_own = node.attr in own and not ast.unparse(node.value).startswith("super(")
        is_class_swap = node.attr == "__class__" and isinstance(node.ctx, ast.Store)
        if is_class_swap or (is_private and not is_own):
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_private_name_is_used_elsewhere(path):
    assert not private_names(path)
