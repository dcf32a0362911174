"""The command `tjepa`: one subcommand for each thing that a user does, each the same as the main of its file.

    tjepa prepare configs/prepare_tinystories.yaml
    tjepa pretrain --train_file stories.parquet --tokenizer_name my-tokenizer
    tjepa probe --help

Several processes are started by `accelerate launch`: `accelerate launch run_pretraining.py` in a clone, or
`accelerate launch -m tjepa.run_pretraining` anywhere.
"""

import sys
from importlib import import_module

from .corpus.arguments import start


COMMANDS = {  # subcommand -> (module, what it does)
    "prepare": (
        "corpus.prepare_dataset",
        "tokenize documents once, into a folder that pretraining loads",
    ),
    "tokenizer": ("corpus.train_tokenizer", "train a tokenizer on your own documents"),
    "pretrain": ("run_pretraining", "pretrain a text encoder"),
    "probe": ("downstream.run_probing", "judge frozen encoders, beside the untrained encoder and TF-IDF"),
    "classify": ("downstream.run_classification", "fine-tune an encoder to classify texts or pairs of texts"),
    "tag": ("downstream.run_token_classification", "fine-tune an encoder to tag the words of sentences"),
    "convert": ("tools.convert_checkpoint", "turn a run folder of the original T-JEPA code into a model folder"),
    "export": ("tools.export_sentence_transformer", "write a folder that sentence-transformers loads"),
}


def usage() -> str:
    lines = [f"  {name:<10} {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(["usage: tjepa COMMAND [FILE.yaml] [--name value ...]", "", *lines, "", "tjepa COMMAND --help"])


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        print(f"tjepa: error: there is no command {name!r}.\n{usage()}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"tjepa {name}", *arguments]
    start(import_module(f".{COMMANDS[name][0]}", __package__).main)


if __name__ == "__main__":
    main()
