"""Tasks of the `mteb` package (Massive Text Embedding Benchmark, arXiv 2210.07316), for `tjepa probe --mteb TASK`.

Notable: mteb judges vectors as `tjepa.embed` makes them, with the modules of sentence-transformers where a folder has
them. mteb is imported only when it is asked for. Its results are kept as it keeps them itself, in JSON files that its
own tools read, and go into the `model-index` of the model's card.
"""

import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from ..corpus.atomic_writes import replacing_files
from ..corpus.command_line import first_line
from .embedding import load_embedder


logger = logging.getLogger(__name__)


def load_mteb_tasks(names: Sequence[str]) -> list[Any]:
    """
    Args:
        names: names of mteb's tasks, or Python files that define tasks of one's own, as mteb documents them: classes
            that inherit from one of `mteb.abstasks` and have a `metadata`.

    Returns:
        A list of `mteb.AbsTask`.

    Raises:
        FileNotFoundError: for a file that is not there.
        ImportError: if mteb is not installed.
        ValueError: for a name that mteb does not know, or a file without a task.
    """
    if importlib.util.find_spec("mteb") is None:
        raise ImportError('--mteb needs the package mteb: pip install "tjepa[mteb]"')
    import mteb

    tasks = []
    for name in names:
        if not name.endswith(".py"):
            try:
                tasks.append(mteb.get_task(name))
            except KeyError as error:
                raise ValueError(f"--mteb {name}: {error.args[0]} A task of your own is given as FILE.py.") from error
            continue
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"--mteb {name}: there is no such file.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"--mteb {name} cannot be run: {type(error).__name__}: {error}") from error
        own = [
            found
            for found in vars(module).values()
            if isinstance(found, type) and issubclass(found, mteb.AbsTask) and found.__module__ == path.stem
        ]
        if not own:
            raise ValueError(f"--mteb {name} defines no task: a class with a `metadata`, of one in `mteb.abstasks`.")
        tasks += [task() for task in own]
    return tasks


def run_mteb(
    name: str,
    column: str,
    tasks: Sequence[Any],
    output: str | Path,
    max_length: int | None,
    batch_size: int,
    **for_hub,
) -> dict[str, float]:
    """
    Runs tasks on one encoder. mteb's JSON files come to lie in `output`, under `results/`; the card of a model that is
    a folder gets the figures, too.

    Args:
        name: a folder, or a name on the Hub.
        column: what a folder is called among others.
        tasks: what `load_mteb_tasks` returned.
        max_length, batch_size, for_hub: as in `load_embedder` and `Embedder`.

    Returns:
        `"task/metric"` -> mean of the main score over splits and subsets.
    """
    import mteb
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    embedder = load_embedder(name, max_length=max_length, **for_hub)
    folder = Path(name)
    label = name
    if folder.is_dir():  # mteb wants owner/name
        label = f"local/{(column.lstrip('./') or folder.resolve().name).replace('/', '-')}"

    class Encoder(AbsEncoder):
        model = embedder
        mteb_model_meta = ModelMeta.create_empty({"name": label, "embed_dim": embedder.width})

        def encode(self, inputs, **kwargs):
            texts = [text for batch in inputs for text in batch["text"]]
            return embedder(texts, batch_size).numpy()

    try:
        found = mteb.evaluate(
            Encoder(),
            tasks,
            co2_tracker=False,
            cache=mteb.ResultCache(output),
            overwrite_strategy="always",  # what is kept there may be of other weights
            show_progress_bar=False,
        )
    except Exception as error:  # of a task, its data or its measures
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"--mteb could not judge {name} by {[task.metadata.name for task in tasks]}: {reason}"
        ) from error
    scores = {}
    for task, result in zip(tasks, found.task_results, strict=True):
        scores[f"{result.task_name}/{task.metadata.main_score}"] = result.get_score()
    card = folder / "README.md"
    if card.is_file():
        rows = zip(tasks, found.task_results, strict=True)
        write_to_card(card, [row for task, result in rows for row in eval_results(task.metadata, result)])
    return scores


def eval_results(metadata: Any, result: Any) -> list[EvalResult]:
    """
    A task's main score for every split and subset, as a model card has it. (mteb's own `get_hf_eval_results` is
    deprecated, and knows only tasks that mteb comes with.)
    """
    source = metadata.dataset["path"]
    source = Path(source).name if Path(source).exists() else source  # a path may name a person
    return [
        EvalResult(
            task_type=metadata.type,
            dataset_type=re.sub(r"[^\w./-]+", "-", source),
            dataset_name=f"MTEB {metadata.name} ({scores.get('hf_subset', 'default')})",
            dataset_config=scores.get("hf_subset", "default"),
            dataset_split=split,
            dataset_revision=metadata.dataset.get("revision"),
            metric_type=metadata.main_score,
            metric_value=round(scores["main_score"], 5),
        )
        for split, subsets in result.scores.items()
        for scores in subsets
    ]


def write_to_card(path: Path, results: list[EvalResult]) -> None:
    """Puts results into a card's `model-index`, in the place of those that it has for the same things."""
    card = ModelCard.load(path)
    new = {(result.unique_identifier, result.metric_type) for result in results}
    old = [
        result for result in card.data.eval_results or [] if (result.unique_identifier, result.metric_type) not in new
    ]
    card.data.eval_results = [*old, *results]
    card.data.model_name = card.data.model_name or path.resolve().parent.name  # a model-index needs one
    with replacing_files(path.parent) as folder:
        card.save(folder / path.name)
    logger.info(f"{path}: its model-index has the results")
