"""What of a run goes to the Hub, and when."""

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars, validate_repo_id
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_utils import HubStrategy

from .checkpoints import checkpoint_folder
from .model_folder import PRETRAINING_FOLDER, SENTENCE_FILES, STRATEGIES_FILE, sentence_files


logger = logging.getLogger(__name__)

HTTP_ERROR = HfHubHTTPError.__bases__[0]  # of the HTTP library, another one in every version of huggingface-hub


# What --push_to_hub publishes of a folder; the tokenizer's vocabulary files come to it by their own names.
PUBLISHED_FILES = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "README.md"),
    # by name: a star would match in the folders of checkpoints, too
    *(f"{name}_tjepa.py" for name in ("configuration", "layers", "encoders", "predictors", "losses", "modeling")),
    *("config.json", "tokenizer.json", "tokenizer_config.json"),
    *(f"pictures/{name}.png" for name in ("loss", "cosine", "map", "spread")),  # of the card
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]
# what belongs to one set of weights: of an earlier upload nothing of it may stay beside newer ones
WEIGHTS = ["model*.safetensors*", f"{PRETRAINING_FOLDER}/*", "onnx/*", *SENTENCE_FILES, "[0-9]_*/*"]


class HubPublisher(TrainerCallback):
    """
    `--push_to_hub`: the model folder at the end of training and, by `--hub_strategy`, at every save before it.

    The Trainer's own push is not used: it uploads whatever lies in the run folder, TensorBoard files and pickled
    arguments among it. Here only `PUBLISHED_FILES` go out, and with the strategies `checkpoint` and `all_checkpoints`,
    as their names say, the whole checkpoint folder beside them (`last-checkpoint/` or `checkpoint-N/`).

    Args:
        args (`TrainingArguments`): the `hub_` arguments and `output_dir`, whose name is the default repository.
        token (`str`, *optional*): a token with write permission; default: the one that is logged in.

    Raises:
        PermissionError: if the Hub does not know this token.
    """

    def __init__(self, args: TrainingArguments, token: str | None):
        self.api = HfApi(token=token)
        self.strategy, self.revision = HubStrategy(args.hub_strategy), args.hub_revision
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        self.repo_id, self.private = full_name(self.api, name, "--hub_token"), args.hub_private_repo
        self.job = None

    def create_repository(self) -> None:
        """
        Once everything else is ready to train: what ends before leaves no empty repository.

        Raises:
            PermissionError: if the Hub does not let this token create or use the repository.
        """
        with explaining_refusal(self.repo_id, "--hub_token"):
            self.api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            if self.revision is not None:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)

    def on_train_begin(self, args, state, control, **kwargs):
        disable_progress_bars()  # tqdm breaks when bars come and go in the background while the Trainer's is written

    def on_save(self, args, state, control, model=None, processing_class: PreTrainedTokenizerBase = None, **kwargs):
        """Uploads in the background; while one upload runs the next is left out, unless `hub_always_push`."""
        if self.strategy == HubStrategy.END or not state.is_world_process_zero:
            return
        if self.job is not None and not self.job.done() and not args.hub_always_push:
            logger.info(f"Step {state.global_step} is not pushed: the push before it still runs.")
            return
        checkpoint = checkpoint_folder(args, state)
        copy = tempfile.TemporaryDirectory()  # the Trainer may delete the checkpoint while it is read
        try:
            shutil.copytree(checkpoint, copy.name, dirs_exist_ok=True)
        except OSError as error:  # training goes on; the push at its end counts
            copy.cleanup()
            logger.warning(f"Step {state.global_step} is not pushed: {checkpoint} could not be copied. {error}")
            return
        is_ours = getattr(model.config, "encoder", None) is None  # else the repository's root is for the encoder
        where = {"delete_patterns": WEIGHTS} if is_ours else {"path_in_repo": PRETRAINING_FOLDER}
        uploads = [{"allow_patterns": published_files(processing_class), **where}]
        if self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last_only = self.strategy == HubStrategy.CHECKPOINT
            uploads.append({"path_in_repo": "last-checkpoint" if is_last_only else checkpoint.name})
        message = f"Training in progress, step {state.global_step}"
        self.job = self.api.run_as_future(self._upload_checkpoint, copy, message, uploads)  # one after the other

    def _upload_checkpoint(self, copy: tempfile.TemporaryDirectory, message: str, uploads: list[dict]) -> None:
        try:
            with copy as folder:
                for upload in uploads:
                    note = ", checkpoint" if "path_in_repo" in upload else ""
                    self._upload(folder, message + note, **upload)
        except Exception as error:  # training goes on; the push at its end counts
            logger.warning(f"{message}: the push to {self.repo_id} failed. {error}")

    def _upload(self, folder: str, message: str, **upload) -> None:
        self.api.upload_folder(
            repo_id=self.repo_id, folder_path=folder, commit_message=message, revision=self.revision, **upload
        )

    def publish_model_folder(self, folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Uploads what may be published of the folder: of another architecture's encoder `pretraining/` and the modules
        of sentence-transformers, too.

        Raises:
            RuntimeError: if the upload failed; the folder is whole all the same.
        """
        if self.job is not None:
            self.job.result()
        enable_progress_bars()
        try:
            files = published_files(tokenizer, folder)
            self._upload(folder, "End of training", allow_patterns=files, delete_patterns=WEIGHTS)
        except Exception as error:
            raise RuntimeError(
                f"The push to {self.repo_id} failed, but nothing is lost: {folder} holds the whole model. Push it "
                f"later with `hf upload {self.repo_id} {folder}` and --include for each of its model files."
            ) from error
        logger.info(f"Pushed to {self.repo_id}")


def check_repo_id(repo_id: str) -> None:
    """
    Raises:
        ValueError: if it is not a name that the Hub allows.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(str(error)) from error


def full_name(api: HfApi, repo_id: str, flag: str) -> str:
    """
    `owner/name` of a repository, where `name` alone is one's own. It is asked for before the work, because it shows
    whether the Hub knows the token and what it is for, and makes nothing there.

    Raises:
        PermissionError: if it does not, or if the token is for reading; the message names the flag.
        ValueError: if it is not a name that the Hub allows.
    """
    check_repo_id(repo_id)
    with explaining_refusal(repo_id, flag):
        try:
            account = api.whoami()
        except HfHubHTTPError as error:
            if error.response.status_code != 429 or "/" not in repo_id:
                raise
            return repo_id  # asked too often, as where many runs start at once: it says nothing about the token
    if ((account.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise PermissionError(
            f"The token may only read, and {repo_id} is to be written: pass one that may write there as {flag}, or "
            "log in with `hf auth login`."
        )
    return repo_id if "/" in repo_id else f"{account['name']}/{repo_id}"


@contextmanager
def explaining_refusal(repo_id: str, flag: str) -> Iterator[None]:
    """
    Around what asks the Hub for access to a repository.

    Raises:
        PermissionError: if the Hub does not give it.
        ConnectionError: if it cannot be reached.
    """
    try:
        yield
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise PermissionError(
            f"The Hub does not give access to {repo_id}: {error}\nPass a token that may write there as {flag}, or log "
            "in with `hf auth login`. Nothing was uploaded."
        ) from error
    except HTTP_ERROR as error:
        raise ConnectionError(
            f"The Hub cannot be reached to ask for access to {repo_id}: {error}. Try again, or publish later. "
            "Nothing was uploaded."
        ) from error


def published_files(tokenizer: PreTrainedTokenizerBase, folder: str | None = None) -> list[str]:
    """Patterns of all that may be published; with the folder that was written also of what is not in every one."""
    files = [*PUBLISHED_FILES, *tokenizer.vocab_files_names.values()]
    if folder is not None and (Path(folder) / PRETRAINING_FOLDER).is_dir():
        files += [f"{PRETRAINING_FOLDER}/{name}" for name in (*files, STRATEGIES_FILE)]
        files += sentence_files(Path(folder))
    return files


def create_publisher(args: TrainingArguments, token: str | None) -> HubPublisher | None:
    """
    The publisher that `--push_to_hub` asks for, on the main process. Afterwards the arguments hold no token, for they
    are pickled into every checkpoint, and the Trainer does not push by itself. Without training there is none: an
    evaluation writes nothing that could be published.
    """
    token, args.hub_token = args.hub_token or token, None
    publisher = None
    if args.push_to_hub and not args.do_train:
        logger.warning("--push_to_hub: without training nothing is pushed")
    elif args.push_to_hub and args.process_index == 0:
        publisher = HubPublisher(args, token)
        args.hub_model_id = publisher.repo_id  # with the user's name, if it had none
    args.push_to_hub = False
    return publisher
