"""Puts a pretraining folder on the Hub: both encoders and the predictor, tokenizer, card, pictures, an ONNX graph, the
modules of sentence-transformers, and a tag for each checkpoint that was kept.

    tjepa publish runs/quickstart --repo_id me/quickstart --dry_run
    tjepa publish runs/quickstart --repo_id me/quickstart --private

Notable: what may go is a list of names (`PUBLISHED_FILES`), and nothing else in the folder is looked at: no optimizer
state, no log, no arguments. Started again after an interruption it goes on: the Hub has kept each large file that
arrived. The weights of step N are those of the tag `step-N`, whose commits are on the branch `checkpoints`, so that
`main` never holds anything but the end of the run.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import filter_repo_objects
from transformers import PreTrainedTokenizerBase

from ..corpus.atomic_writes import files_in
from ..corpus.command_line import start
from ..corpus.tokenizers import ensure_pad_token, load_tokenizer
from ..modeling_tjepa import TJEPAForPreTraining
from ..training.checkpoints import is_marked, list_checkpoints
from ..training.loading import load_config, load_encoder
from ..training.model_card import UNNAMED
from ..training.model_folder import ONNX_FILES, PRETRAINING_FOLDER, STRATEGIES_FILE, save_encoder, sentence_files
from ..training.publishing import WEIGHTS, check_repo_id, explaining_refusal, full_name, published_files
from ..training.record import read_run
from ..training.setup import hide_what_loading_says
from .export_sentence_transformer import (
    add_whitening_flags,
    check_onnx,
    export_onnx,
    export_sentence_transformer,
    whitening_texts,
)
from .health import summarise_run


BRANCH = "checkpoints"

SENTENCES_NOTE = """
With sentence-transformers, which makes a vector of a text:

```python
from sentence_transformers import SentenceTransformer

embeddings = SentenceTransformer("{repo_id}", trust_remote_code=True).encode(["A text.", "Another one."])
```
"""
ONNX_NOTE = """
For ONNX Runtime: `onnx/model.onnx` takes `input_ids` and `attention_mask`, int64 `[batch, length]`, and gives
`last_hidden_state`, float32 `[batch, length, {width}]`, and `sentence_embedding`, a vector for each text.
"""
TAGS_NOTE = """
The weights on the way are tags, for `from_pretrained(..., revision="{tag}")`: {tags}.
"""


# --- What goes -------------------------------------------------------------------------------------------------------


def list_published(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """Path in the repository -> file, of what the whitelist names of a folder."""
    files = {path.relative_to(folder).as_posix(): path for path in files_in(folder)}
    allowed = [*published_files(tokenizer, str(folder)), *sentence_files(folder)]
    return {name: files[name] for name in filter_repo_objects(files, allow_patterns=allowed)}


def stage(
    folder: Path,
    staging: Path,
    repo_id: str,
    tags: list[str],
    texts: Iterable[str | None] | None,
    whitening_dimensions: int | None,
    with_onnx: bool,
) -> dict[str, Path]:
    """
    Makes in `staging` what a run's folder lacks: the modules of sentence-transformers, the ONNX graph, a padding token
    and the repository's name in the card.

    Returns:
        Path in the repository -> file, of all that `main` gets.
    """
    tokenizer, config = load_tokenizer(str(folder), "folder"), load_config(str(folder), flag="folder")
    notes = []
    if config.model_type == "tjepa":
        with tempfile.TemporaryDirectory() as parent:
            export = Path(parent) / "export"
            options = {"whitening_texts": texts, "whitening_dimensions": whitening_dimensions}
            export_sentence_transformer(folder, export, **options)
            for name in sentence_files(export):
                (staging / name).parent.mkdir(exist_ok=True)
                (export / name).replace(staging / name)
        if tokenizer.pad_token is None:  # which batches need
            ensure_pad_token(tokenizer)
            tokenizer.save_pretrained(staging)
    if sentence_files(staging) or sentence_files(folder):
        notes.append(SENTENCES_NOTE)
    if with_onnx:
        modules = next((place for place in (staging, folder) if sentence_files(place)), None)
        export_onnx(load_encoder(config, str(folder), attn_implementation="eager"), staging / ONNX_FILES[0], modules)
        notes.append(ONNX_NOTE)
    if tags:
        notes.append(TAGS_NOTE)
    card = ModelCard.load(folder / "README.md")
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *["onnx"] * with_onnx]))
    if UNNAMED in card.text:
        card.data.model_name = repo_id.split("/")[-1]
        card.text = card.text.replace(UNNAMED, repo_id)
    facts = {"repo_id": repo_id, "width": config.hidden_size, "tag": (tags or [""])[0], "tags": ", ".join(tags)}
    card.text += "\n\n## Other ways in\n" + "".join(note.format(**facts) for note in notes)
    card.save(staging / "README.md")
    graph = {name: staging / name for name in ONNX_FILES if (staging / name).is_file()}
    return {**list_published(folder, tokenizer), **list_published(staging, tokenizer), **graph}


def stage_checkpoint(checkpoint: Path, staging: Path, folder: Path) -> dict[str, Path]:
    """As `stage`: what the tag of a checkpoint gets, which `from_pretrained` loads as it does the end of the run."""
    tokenizer = load_tokenizer(str(checkpoint), "checkpoint")
    files = list_published(checkpoint, tokenizer)
    if load_config(str(checkpoint), flag="checkpoint").encoder is None:
        return files
    model = TJEPAForPreTraining.from_pretrained(checkpoint)
    save_encoder(model, read_run(folder).exported, staging)
    tokenizer.save_pretrained(staging)
    modules = {name: folder / name for name in sentence_files(folder)}
    inside = {f"{PRETRAINING_FOLDER}/{name}": path for name, path in files.items()}
    return {**inside, **modules, **list_published(staging, tokenizer)}


# --- How it goes -----------------------------------------------------------------------------------------------------


def additions(files: dict[str, Path]) -> list[CommitOperationAdd]:
    return [CommitOperationAdd(name, path) for name, path in sorted(files.items())]


def describe(revision: str, operations: list[CommitOperationAdd]) -> str:
    """What would go to a revision: size in bytes, SHA-256 and name of each file."""
    sizes = [operation.upload_info.size for operation in operations]
    lines = [
        f"  {operation.upload_info.size:>13,}  {operation.upload_info.sha256.hex()}  {operation.path_in_repo}"
        for operation in operations
    ]
    return "\n".join([f"{revision}: {len(operations)} files, {sum(sizes):,} bytes", *lines])


def find_published_tags(api: HfApi, repo_id: str, plans: dict[str, list[CommitOperationAdd]]) -> set[str]:
    """
    The tags that are on the Hub already.

    Raises:
        ValueError: if one of them has other weights.
    """
    there = {tag.name for tag in api.list_repo_refs(repo_id).tags} & plans.keys()
    for tag in sorted(there):
        hashes = {
            file.path: file.lfs.sha256
            for file in api.list_repo_tree(repo_id, recursive=True, revision=tag)
            if isinstance(file, RepoFile) and file.lfs is not None
        }
        for operation in plans[tag]:
            if hashes.get(operation.path_in_repo, "") not in ("", operation.upload_info.sha256.hex()):
                raise ValueError(
                    f"{repo_id} has the tag {tag} with other weights, those of another run, and a tag keeps what it "
                    "names. Nothing was uploaded. Choose another --repo_id, or delete that tag on the Hub."
                )
    return there


def publish(args: argparse.Namespace) -> None:
    """
    Publishes a pretraining folder, or says what would go, as the flags in `main` say.

    Raises:
        FileNotFoundError, ValueError: if the folder is not that of a finished run, or a tag has other weights.
        ImportError: if what makes an ONNX graph is not installed.
        PermissionError: if the Hub does not let this token write.
    """
    folder, repo_id = Path(args.folder), args.repo_id
    check_repo_id(repo_id)
    config = load_config(str(folder), flag="folder")
    is_ours = config.model_type == "tjepa"
    texts = whitening_texts(args, args.folder) if is_ours else None
    of_whitening = ("no_whitening", "whitening_file", "whitening_dimensions", "text_column_name")
    if not is_ours and any(getattr(args, name) for name in of_whitening):
        raise ValueError(
            f"{folder} is a {config.model_type} model, which is published with the modules that it came with: leave "
            "out the flags of whitening."
        )
    place = folder if is_ours else folder / PRETRAINING_FOLDER
    if not (folder / "README.md").is_file() or not (place / STRATEGIES_FILE).is_file():
        raise ValueError(
            f"{folder} is not the folder of a finished pretraining run: README.md or {STRATEGIES_FILE} is not "
            "in it. Name the --output_dir of `tjepa pretrain`; a fine-tuned model is published by --push_to_hub."
        )
    if not args.no_onnx:
        check_onnx("pass --no_onnx")
    api = HfApi(token=args.token)
    if not args.dry_run:
        repo_id = full_name(api, repo_id, "--token")
    checkpoints = {f"step-{step}": path for step, path in list_checkpoints(folder).items() if is_marked(path)}
    with tempfile.TemporaryDirectory() as staging:
        main_folder = Path(staging) / "main"
        files = stage(
            folder, main_folder, repo_id, list(checkpoints), texts, args.whitening_dimensions, not args.no_onnx
        )
        plans = {
            tag: additions(stage_checkpoint(checkpoint, Path(staging) / tag, folder))
            for tag, checkpoint in checkpoints.items()
        }
        print(f"Health: {summarise_run(folder)}")
        if args.dry_run:
            print(f"To {repo_id} would go, with the SHA-256 of each file:\n")
            print(
                "\n\n".join(describe(revision, plan) for revision, plan in {"main": additions(files), **plans}.items())
            )
            return
        with explaining_refusal(repo_id, "--token"):  # only now: what ended before leaves no empty repository
            api.create_repo(repo_id, private=args.private, exist_ok=True)
        there = find_published_tags(api, repo_id, plans)
        commit(api, repo_id, additions(files), f"Publish {folder.name}", "main", WEIGHTS)
        for tag, plan in plans.items():
            if tag not in there:
                print(f"{tag} ...", flush=True)
                publish_tag(api, repo_id, tag, plan)
    print(f"Published {folder} as {api.endpoint}/{repo_id}, with the tags {', '.join(plans) or '(none)'}")


def commit(
    api: HfApi, repo_id: str, plan: list[CommitOperationAdd], message: str, revision: str, ours: list[str]
) -> CommitInfo:
    """Puts files on a branch, in place of all those there that fit one of the patterns `ours`."""
    new = {operation.path_in_repo for operation in plan}
    old = set(filter_repo_objects(api.list_repo_files(repo_id, revision=revision), allow_patterns=ours)) - new
    operations = [*plan, *(CommitOperationDelete(name) for name in sorted(old - {".gitattributes"}))]
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def publish_tag(api: HfApi, repo_id: str, tag: str, plan: list[CommitOperationAdd]) -> None:
    """Puts a checkpoint's files, and no others, on the branch, and tags that."""
    api.create_branch(repo_id, branch=BRANCH, exist_ok=True)
    done = commit(api, repo_id, plan, f"Weights of {tag}", BRANCH, ["*"])
    api.create_tag(repo_id, tag=tag, revision=done.oid, exist_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="the output_dir of a pretraining run")
    parser.add_argument("--repo_id", required=True, help="the repository on the Hub: owner/name")
    parser.add_argument("--dry_run", action="store_true", help="print what would go, with sizes and hashes, and stop")
    parser.add_argument(
        "--private", action="store_true", default=None, help="make the repository private if it is new"
    )
    parser.add_argument("--token", help="a token with write permission; default: the one that is logged in")
    parser.add_argument("--no_onnx", action="store_true", help="make no ONNX graph")
    add_whitening_flags(parser)
    args = parser.parse_args()
    hide_what_loading_says()
    publish(args)


if __name__ == "__main__":
    start(main)
