"""Fine-tunes an encoder to tag words: parts of speech, chunks, named entities.

    tjepa tag --model_name_or_path runs/quickstart \\
        --dataset_name eriktks/conll2003 --label_column ner_tags
    tjepa tag --model_name_or_path runs/quickstart --train_file train.jsonl

Rows have a list of words and a list of as many tags (names or numbers). Arguments come from dataclasses, from a YAML
file as the first argument, or from both (flags win).
"""

from ..corpus.command_line import start
from .finetuning import finetune
from .tasks import WordTask


def main():
    finetune(WordTask, description=__doc__)


if __name__ == "__main__":
    start(main)
