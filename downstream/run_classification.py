"""Fine-tunes an encoder to classify texts or pairs of texts: one class, several classes, or a number for each.

    tjepa classify --model_name_or_path runs/quickstart --dataset_name stanfordnlp/sst2
    tjepa classify --model_name_or_path runs/quickstart --train_file train.csv
    tjepa classify --model_name_or_path runs/quickstart --train_file train.csv --freeze_encoder  # a linear probe

Arguments come from dataclasses, from a YAML file as the first argument, or from both (flags win). Notable: the labels
decide what is trained. Names and integers are classes, lists of them are several classes for a text, numbers with a
fraction are a regression; `--problem_type` overrides this.
"""

from ..corpus.command_line import start
from .finetuning import finetune
from .tasks import TextTask


def main():
    finetune(TextTask, description=__doc__)


if __name__ == "__main__":
    start(main)
