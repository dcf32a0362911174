"""The command `tjepa`: one subcommand for each thing that a user does, each the same as the main of its file.

    tjepa prepare configs/prepare_tinystories.yaml
    tjepa pretrain --train_file stories.parquet --tokenizer_name my-tokenizer
    tjepa adapt sentence-transformers/all-MiniLM-L6-v2 --train_file my.txt --output_dir my-encoder
    tjepa probe --help

Several processes are started by `accelerate launch`: `accelerate launch run_pretraining.py` in a clone, or
`accelerate launch -m tjepa.run_pretraining` anywhere.
"""

import sys
from importlib import import_module
from importlib.metadata import version
from itertools import takewhile

from .corpus.command_line import answer_early, errors_in_one_line, is_yaml, start, wants_help


COMMANDS = {  # subcommand -> (module, what it does)
    "prepare": ("corpus.prepare_dataset", "tokenize documents once, into a folder that pretraining loads"),
    "tokenizer": ("corpus.train_tokenizer", "train a tokenizer on your own documents"),
    "pretrain": ("run_pretraining", "pretrain a text encoder"),
    "adapt": ("run_pretraining", "continue the pretraining of any text encoder on your own texts"),
    "report": ("tools.report", "draw a run: one page with its curves, texts and settings"),
    "health": ("tools.health", "say whether a run is healthy, and what to do if not"),
    "probe": ("downstream.run_probing", "judge frozen encoders, beside the untrained encoder and TF-IDF"),
    "classify": ("downstream.run_classification", "fine-tune an encoder to classify texts or pairs of texts"),
    "tag": ("downstream.run_token_classification", "fine-tune an encoder to tag the words of sentences"),
    "search": ("tools.search", "find texts by what they mean, by default in the docstrings that are installed"),
    "embed": ("tools.embed", "write a vector for each text of a file, for an index or a database"),
    "fill": ("tools.fill", "guess the hidden words of a text"),
    "demo": ("tools.demo", "try a model in the browser: what is hidden, what it expects, search"),
    "train-decoder": ("tools.train_decoder", "fit a token head to the predictions of a model that has none"),
    "convert": ("tools.convert_checkpoint", "turn a run folder of the original T-JEPA code into a model folder"),
    "export": ("tools.export_sentence_transformer", "write a folder that sentence-transformers loads"),
    "publish": ("tools.publish", "put a run's folder on the Hub, with ONNX and the files of sentence-transformers"),
}


ADAPT_USAGE = """usage: tjepa adapt ENCODER [FILE.yaml] --train_file FILE --output_dir FOLDER [--name value ...]

Continue the pretraining of a text encoder on your own texts. ENCODER is a folder or a name on the Hub: BERT, RoBERTa,
ModernBERT, ..., or a model of sentence-transformers. The output folder is of the same kind. The run ends with what it
did to the encoder, judged on texts that were held out.

  --train_file FILE             parquet, json, jsonl, csv, tsv or txt (one text per line); or --dataset_name
  --output_dir FOLDER           where the encoder goes. Default: runs/adapted
  --max_length N                tokens of a text that are read at once. Default: 128; longer texts are split
  --num_train_epochs N          how often each text is seen. Default: 3; or --max_steps
  --probe_file FILE             texts with labels (columns text and label), to judge by as well
  --learning_rate X             of the encoder. Default: 1e-4; less teaches, and forgets, less

All other flags are those of `tjepa pretrain --help`. What is not given is taken from configs/adapt.yaml."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    how, more = "usage: tjepa COMMAND [FILE.yaml] [--name value ...]", "The flags of a command: tjepa COMMAND --help"
    return "\n".join([how, "", *lines, "", more])


def main() -> None:
    name, *arguments = sys.argv[1:] or ["--help"]
    answers = {"-h": usage, "--help": usage, "--version": lambda: version("tjepa")}
    if name == "adapt" and wants_help(arguments):
        answers[name] = lambda: ADAPT_USAGE
    if name in answers:
        with errors_in_one_line():
            print(answers[name](), flush=True)
        return
    if name not in COMMANDS:
        print(f"tjepa: error: there is no command {name!r}.\n{usage()}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"tjepa {name}", *arguments]
    with errors_in_one_line():
        if name == "adapt":
            sys.argv = adapt(sys.argv)
    answer_early(name if name != "adapt" else "pretrain")  # before torch is imported
    start(import_module(f".{COMMANDS[name][0]}", __package__).main)


def adapt(arguments: list[str]) -> list[str]:
    """
    `ENCODER [FILE.yaml] --name value ...` as `tjepa pretrain` takes it, with the recipe for trained encoders.

    Raises:
        ValueError: if no encoder is named.
    """
    command, *arguments = arguments
    if not arguments or arguments[0].startswith("-") or is_yaml(arguments[0]):
        raise ValueError(
            "Which encoder? Its folder, or its name on the Hub, comes first: tjepa adapt ENCODER --train_file my.txt "
            "--output_dir my-encoder"
        )
    encoder, *others = arguments
    files = list(takewhile(lambda argument: not argument.startswith("-"), others))
    if texts := [file for file in files if not is_yaml(file)]:
        raise ValueError(f"{texts[0]} stands behind the encoder without a flag. Texts are --train_file {texts[0]}.")
    return [command, "configs/adapt.yaml", *files, "--model_name_or_path", encoder, *others[len(files) :]]


if __name__ == "__main__":
    main()
