"""The arguments of fine-tuning: the model, the data of either task, and the training."""

from dataclasses import dataclass, field
from typing import Literal

from transformers.hf_argparser import HfArg

from ..corpus.documents import SourceArguments
from ..corpus.tokenizers import HubArguments
from ..training.arguments import RunArguments


SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@dataclass(kw_only=True)
class ModelArguments(HubArguments):
    model_name_or_path: str = HfArg(
        help="The encoder to start from, on the Hub or in a folder: one that `tjepa pretrain` wrote, one of an "
        "encoder or of a fine-tuned model, or another encoder of transformers."
    )
    tokenizer_name: str | None = HfArg(default=None, help="The tokenizer, if it is not that of the model.")
    encoder: Literal["target", "context"] = HfArg(
        default="target", help="Which encoder of a pretraining folder: target, the moving average, or context."
    )
    freeze_encoder: bool = HfArg(
        default=False, help="Train the head alone, on the encoder as it is and without dropout in it: a linear probe."
    )
    config_overrides: str | None = HfArg(
        default=None, help="Overrides of the configuration: classifier_pooling=attention,classifier_dropout=0.1"
    )
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of model_name_or_path.")
    model_license: str | None = HfArg(
        default=None, help="Licence of the weights, for the model card. Default: none is named."
    )


@dataclass(kw_only=True)
class DataArguments(SourceArguments):
    """What texts and words have in common: a source of documents, but without streams and without its text column."""

    dataset_name: str | None = HfArg(
        default=None, help="A dataset on the Hub or in a folder, with a train split; validation and test are optional."
    )
    train_file: str | None = HfArg(
        default=None,
        help="A local file, or a glob in quotes: json, jsonl, csv, tsv or parquet, as it is or compressed.",
    )
    test_file: str | None = HfArg(default=None, help="The same for the test split.")
    test_split_name: str | None = HfArg(
        default=None, help="The split of --dataset_name to predict. Default: test, where there is one."
    )
    validation_split_percentage: float = HfArg(
        default=10,
        help="Percentage of the train rows, drawn at random with a fixed seed, that becomes the validation split "
        "where there is none. 0: no validation split.",
    )
    max_train_samples: int | None = HfArg(
        default=None, help="Use at most so many train rows, drawn at random with a fixed seed. Default: all."
    )
    max_eval_samples: int | None = HfArg(default=None, help="The same for the validation rows. Default: all.")
    label_column: str | None = HfArg(default=None, help="The column of the labels. Default: one of the usual names.")
    max_length: int | None = HfArg(
        default=None, help="Texts are cut off after so many tokens. Default: what model and tokenizer were made for."
    )
    max_predict_samples: int | None = HfArg(
        default=None, help="Use at most so many rows of the test split, drawn at random with a fixed seed."
    )
    streaming: bool = field(init=False, default=False)
    text_column_name: str | None = field(init=False, default=None)

    def __post_init__(self):
        super().__post_init__()
        self.check_source()


@dataclass(kw_only=True)
class TextArguments(DataArguments):
    text_column: str | None = HfArg(default=None, help="The column of the texts. Default: one of the usual names.")
    text_pair_column: str | None = HfArg(
        default=None, help="The column of the second text of each pair. Default: none, or that of a usual pair."
    )
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = HfArg(
        default=None, help="What the labels are. Default: found out from those of the train split."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.text_pair_column is not None and self.text_column is None:
            raise ValueError(
                "--text_pair_column is the second text of each pair: pass --text_column, the first, as well."
            )


@dataclass(kw_only=True)
class WordArguments(DataArguments):
    text_column: str | None = HfArg(
        default=None, help="The column of the word lists. Default: one of the usual names."
    )
    label_all_tokens: bool = HfArg(
        default=False,
        help="Train on all tokens of a word, the first with its tag and the others with it, too (B-X becomes I-X). "
        "Figures count the first alone in any case.",
    )


@dataclass
class FinetuningArguments(RunArguments):
    """`TrainingArguments` that train, evaluate and test unless told otherwise."""

    KIND = "finetuning"

    output_dir: str | None = HfArg(default="runs/finetuned", help="Model, checkpoints and results go here.")
    per_device_train_batch_size: int = HfArg(default=32, help="Rows of each training step and process.")
    per_device_eval_batch_size: int = HfArg(default=128, help="Rows of each forward when evaluating.")
    do_train: bool = HfArg(
        default=True,
        help="Whether to train. False: evaluate what --model_name_or_path or --resume_from_checkpoint names, and "
        "write figures and predictions but no weights.",
    )
    do_eval: bool = HfArg(default=True, help="Whether to evaluate on the validation split at the end.")
    do_predict: bool = HfArg(
        default=True, help="Whether to evaluate on the test split, if there is one, at the end, and write predictions."
    )
    learning_rate: float = HfArg(
        default=3e-4, help="Highest learning rate; 3e-4 suits encoders of a few million parameters, 2e-5 BERT's size."
    )

    def __post_init__(self):
        if self.greater_is_better is None and self.metric_for_best_model in ("mse", "eval_mse"):
            self.greater_is_better = False  # transformers knows only names that end in loss
        super().__post_init__()
