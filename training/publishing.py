"""What of a run goes to the Hub, and when."""

import logging
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import create_branch, create_repo, run_as_future, upload_folder
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import HubStrategy

from .arguments import PretrainingArguments


logger = logging.getLogger(__name__)


# What --push_to_hub publishes of a folder; the tokenizer's vocabulary files come to it by their own names.
PUBLISHED_FILES = [
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "README.md"),
    *("config.json", "configuration_tjepa.py", "modeling_tjepa.py", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
]


class HubPublisher(TrainerCallback):
    """
    `--push_to_hub`: the model folder at the end of training and, by `--hub_strategy`, at every save before it.

    The Trainer's own push is not used: it uploads whatever lies in the run folder, TensorBoard files and pickled
    arguments among it. Here only `PUBLISHED_FILES` go out, and with the strategies `checkpoint` and `all_checkpoints`,
    as their names say, the whole checkpoint folder beside them (`last-checkpoint/` or `checkpoint-N/`).

    Args:
        args (`PretrainingArguments`): the `hub_` arguments and `output_dir`, whose name is the default repository.
        token (`str`, *optional*): a token with write permission; default: the one that is logged in.

    Raises:
        PermissionError: if the Hub does not let this token create or use the repository.
    """

    def __init__(self, args: PretrainingArguments, token: str | None):
        self.strategy = HubStrategy(args.hub_strategy)
        self.hub = {"token": token, "revision": args.hub_revision}
        repo_id = args.hub_model_id or Path(args.output_dir).resolve().name
        try:
            self.repo_id = create_repo(repo_id, token=token, private=args.hub_private_repo, exist_ok=True).repo_id
            if args.hub_revision is not None:
                create_branch(self.repo_id, branch=args.hub_revision, token=token, exist_ok=True)
        except HfHubHTTPError as error:
            raise PermissionError(
                f"The Hub does not give access to {repo_id}: {error}\nPass a token that may write there as "
                "--hub_token, or log in with `hf auth login`. Nothing was trained yet."
            ) from error
        self.jobs = []

    def upload(self, folder: str, message: str, allow_patterns: list[str] | None, path_in_repo: str | None = None):
        upload_folder(
            repo_id=self.repo_id,
            folder_path=folder,
            path_in_repo=path_in_repo,
            commit_message=message,
            allow_patterns=allow_patterns,
            **self.hub,
        )

    def on_train_begin(self, args, state, control, **kwargs):
        disable_progress_bars()  # tqdm breaks when bars come and go in the background while the Trainer's is written

    def on_save(self, args, state, control, processing_class: PreTrainedTokenizerBase = None, **kwargs):
        """Uploads in the background; while one upload runs the next is left out, unless `hub_always_push`."""
        if self.strategy == HubStrategy.END or not state.is_world_process_zero:
            return
        if self.jobs and not self.jobs[-1].done() and not args.hub_always_push:
            logger.info(f"Step {state.global_step} is not pushed: the push before it still runs.")
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        copy = tempfile.TemporaryDirectory()  # the Trainer may delete the checkpoint while it is read
        shutil.copytree(checkpoint, copy.name, dirs_exist_ok=True)
        message = f"Training in progress, step {state.global_step}"
        folder_on_hub = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: checkpoint.name,
        }.get(self.strategy)
        self.jobs.append(run_as_future(self._upload_checkpoint, copy, message, processing_class, folder_on_hub))

    def _upload_checkpoint(self, copy: tempfile.TemporaryDirectory, message: str, tokenizer, folder_on_hub) -> None:
        try:
            with copy as folder:
                self.upload(folder, message, published_files(tokenizer))
                if folder_on_hub is not None:
                    self.upload(folder, f"{message}, checkpoint", allow_patterns=None, path_in_repo=folder_on_hub)
        except Exception as error:  # training goes on; the push at its end counts
            logger.warning(f"{message}: the push to {self.repo_id} failed. {error}")

    def publish_model_folder(self, folder: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Raises:
            RuntimeError: if the upload failed; the folder is whole all the same.
        """
        for job in self.jobs:
            job.result()
        enable_progress_bars()
        try:
            self.upload(folder, "End of training", published_files(tokenizer))
        except Exception as error:
            raise RuntimeError(
                f"The push to {self.repo_id} failed, but nothing is lost: {folder} holds the whole model. Push it "
                f"later with `hf upload {self.repo_id} {folder}` and --include for each of its model files."
            ) from error
        logger.info(f"Pushed to {self.repo_id}")


def published_files(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [*PUBLISHED_FILES, *tokenizer.vocab_files_names.values()]


def create_publisher(args: PretrainingArguments, token: str | None) -> HubPublisher | None:
    """
    The publisher that `--push_to_hub` asks for, on the main process. Afterwards the arguments hold no token, for they
    are pickled into every checkpoint, and the Trainer does not push by itself.
    """
    token, args.hub_token = args.hub_token or token, None
    publisher = None
    if args.push_to_hub and args.process_index == 0:
        publisher = HubPublisher(args, token)
        args.hub_model_id = publisher.repo_id  # with the user's name, if it had none
    args.push_to_hub = False
    return publisher
