"""The command `tjepa` and what every command line has in common: help, flags, YAML files, errors of the user's."""

import json
import os
import runpy
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace

import joblib
import pytest
import torch
from transformers import TrainingArguments

import tjepa
from helpers import REPOSITORY
from tjepa import cli, run_pretraining
from tjepa.corpus.arguments import parse_arguments
from tjepa.corpus.command_line import (
    CONFIGS,
    FLAG_TABLE,
    answer_early,
    available_cores,
    find_config,
    start,
)
from tjepa.corpus.documents import DataArguments
from tjepa.corpus.prepare_dataset import PreparationArguments
from tjepa.downstream.run_probing import ProbingArguments
from tjepa.run_pretraining import QUICKSTART_CONFIG, MaskingArguments, ModelArguments
from tjepa.training.arguments import PretrainingArguments
from tjepa.training.setup import use_all_cores


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["tjepa", *map(str, arguments)])
    cli.main()


# what parses its arguments as all others do; `adapt` hands them on (test_adapt.py)
PARSING_COMMANDS = sorted(cli.COMMANDS.keys() - {"adapt"})


@pytest.mark.parametrize("command", PARSING_COMMANDS)
def test_every_help_fits(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, command, "--help")
    help_text = capsys.readouterr().out
    assert end.value.code in (0, None)
    assert len(help_text.splitlines()) < 200
    assert f"usage: tjepa {command}" in help_text
    plain = ("convert", "demo", "embed", "export", "fill", "health", "publish", "report", "search", "train-decoder")
    if command not in plain:
        assert "A YAML file of lines `name: value` may come first" in " ".join(help_text.split())
        assert "--output" in help_text
    if command in ("pretrain", "classify", "tag"):
        assert help_text.index("\nmodel:") < help_text.index("--learning_rate")
        assert "transformers/main_classes/trainer" in help_text
        assert "\n  --max_grad_norm" not in help_text  # inherited and unchanged


def test_the_command_without_a_subcommand_lists_them(monkeypatch, capsys):
    run(monkeypatch)
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "pretain")
    assert end.value.code == 2 and "no command 'pretain'" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
@pytest.mark.parametrize("arguments", [["--help"], ["adapt", "--help"], ["--version"]])
def test_an_answer_that_nobody_reads_is_no_error(arguments):
    lines = f"import sys\nsys.argv[1:] = {arguments}\nfrom tjepa.cli import main\nmain()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", lines], stdout=full, stderr=subprocess.PIPE, text=True, timeout=100
        )
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", PARSING_COMMANDS)
def test_every_subcommand_is_its_files_main(command, monkeypatch):
    module = import_module(f"tjepa.{cli.COMMANDS[command][0]}")
    seen = []
    monkeypatch.setattr(module, "main", lambda: seen.append(sys.argv))
    run(monkeypatch, command, "value", "--debug")
    assert seen == [[f"tjepa {command}", "value"]]


def test_every_command_knows_flags_with_dashes(monkeypatch):
    seen = []
    monkeypatch.setattr("tjepa.tools.search.main", lambda: seen.extend(sys.argv[1:]))
    run(monkeypatch, "search", "a-b", "--num-results=2", "--debug", "--text-column-name", "c-d")
    assert seen == ["a-b", "--num_results=2", "--text_column_name", "c-d"]


def test_the_version(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"{tjepa.__version__}\n" == f"{version('tjepa')}\n"
    assert dir(tjepa) == sorted([*tjepa.__all__, "__version__"])


# ---- flags ----


def test_dashes_are_as_good_as_underscores_and_values_stay():
    (args,) = parse_arguments(DataArguments, ["--train-file=a-b_c.txt", "--max-length", "128", "--streaming"])
    assert (args.train_file, args.max_length, args.streaming) == ("a-b_c.txt", 128, True)
    _, training = parse_arguments([DataArguments, PretrainingArguments], ["--no-do-eval", "--max-steps", "1"])
    assert training.do_eval is False and training.max_steps == 1


def test_several_files_that_a_shell_made_of_a_glob():
    with pytest.raises(
        ValueError, match="b.txt belongs to no flag: put a value with spaces, or a glob for several files, in quotes"
    ):
        parse_arguments(DataArguments, ["--train_file", "a.txt", "b.txt"])


def test_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = ["x=~/a text/", "--x=~/a", "m=~/a,~/b", "~", "a~/b", "~user/a", "https://a.org/?b=~/c", "1~2"]
    home = str(tmp_path)
    expected = [given[0], f"--x={home}/a", f"m={home}/a,{home}/b", home, *given[4:]]
    monkeypatch.setattr(sys, "argv", ["tjepa x", *given])
    seen = []
    start(lambda: seen.extend(sys.argv[1:]))
    assert seen == expected
    (tmp_path / "a.yaml").write_text("data_dir: ~/x\nmodel_name_or_path: [~/m, n]\n")
    (args,) = parse_arguments(ProbingArguments, [str(tmp_path / "a.yaml")])
    assert (args.data_dir, args.model_name_or_path) == (f"{home}/x", [f"{home}/m", "n"])


def test_no_flag_is_abbreviated():
    with pytest.raises(ValueError, match="There is no argument --train_fil. Did you mean --train_file?"):
        parse_arguments(DataArguments, ["--train_fil", "x.txt"])


PRETRAINING = (ModelArguments, DataArguments, MaskingArguments, PretrainingArguments)


def parse_pretraining(*flags):
    return parse_arguments(
        PRETRAINING, list(flags), default_file=QUICKSTART_CONFIG, default_unless=("dataset_name", "train_file")
    )


@pytest.mark.parametrize("flags", [["--train-file", "x.txt"], ["--train_file=x.txt"], ["--dataset-name=x"]])
def test_with_data_it_is_not_the_quickstart(flags):
    _, data, _, training = parse_pretraining(*flags)
    assert data.max_length == 1024 and training.output_dir == "runs/tjepa"


def test_without_data_it_is_the_quickstart():
    for flags in ([], ["--seed", "1"], ["configs/quickstart.yaml"]):
        model, data, _, training = parse_pretraining(*flags)
        assert data.dataset_name == "quickstart" and training.output_dir == "runs/quickstart"
    assert training.seed == 0 and "predictor_type=boundary" in model.config_overrides


# ---- before torch is imported ----


def test_the_flag_table_is_that_of_the_dataclasses():
    committed = json.loads(FLAG_TABLE.read_text(encoding="utf-8"))
    made = runpy.run_path(str(REPOSITORY / "docs" / "write_flags.py"))["make_table"]()
    if committed["transformers"] != made["transformers"]:  # whose own flags may be others
        for table in (committed, made):
            for row in table["commands"].values():
                row.pop("names")
            table.pop("transformers")
    assert committed == made, "python docs/write_flags.py"


LIGHT = """
import sys
sys.argv = {arguments}
try:
    from tjepa.cli import main
    main()
finally:
    print(sorted({{"torch", "transformers", "datasets", "numpy"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--help"], 0, "judge frozen encoders"),
        (["pretrain", "--help"], 0, "usage: tjepa pretrain [FILE.yaml]"),
        (["pretrain", "--train_fil", "x"], 2, "There is no argument --train_fil. Did you mean --train_file?"),
        (["classify", "refrence.yaml"], 2, "There is no file refrence.yaml. Did you mean reference.yaml?"),
        (["pretrain", "{tmp}/a.yaml"], 2, "has the unknown key 'max_lenght'. Did you mean 'max_length'?"),
        (["pretrain", "--masking-strategies=ul3"], 2, "neither a file nor one of the presets ul2, "),
    ],
)
def test_what_is_answered_before_torch_is_imported(arguments, code, message, tmp_path):
    if version("transformers") != json.loads(FLAG_TABLE.read_text(encoding="utf-8"))["transformers"]:
        pytest.skip("flags of this version are checked by the command itself")
    (tmp_path / "a.yaml").write_text("max_lenght: 8\n")
    arguments = ["tjepa", *(argument.format(tmp=tmp_path) for argument in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY.parent)}
    command = [sys.executable, "-c", LIGHT.format(arguments=arguments)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert message in (result.stderr if code else result.stdout)
    assert result.stdout.splitlines()[-1] == "[]"
    if code:
        assert len(result.stderr.splitlines()) == 1


def test_flags_of_another_transformers_are_left_to_the_command(monkeypatch, tmp_path, capsys):
    table = json.loads(FLAG_TABLE.read_text(encoding="utf-8")) | {"transformers": "5.0.0"}
    (tmp_path / "flags.json").write_text(json.dumps(table))
    monkeypatch.setattr("tjepa.corpus.command_line.FLAG_TABLE", tmp_path / "flags.json")
    monkeypatch.setattr(sys, "argv", ["tjepa pretrain", "--a_new_flag", "x"])
    answer_early("pretrain")
    monkeypatch.setattr(sys, "argv", ["tjepa pretrain", "--a_new_flag", "x", "--masking_strategies", "ul3"])
    with pytest.raises(SystemExit):
        answer_early("pretrain")
    assert "presets" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["ul2", str(CONFIGS / "reference.yaml")])
def test_presets_and_files_of_masking_strategies_pass(argument, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tjepa pretrain", "--masking_strategies", argument, "--no-do-eval", "--debug"])
    answer_early("pretrain")
    assert sys.argv[-1] == "--debug"  # the command still sees it


# ---- YAML files ----


def test_packaged_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/reference.yaml") == find_config("reference.yaml") == CONFIGS / "reference.yaml"
    (tmp_path / "reference.yaml").write_text("max_length: 8\n")
    assert find_config("reference.yaml").read_text() == "max_length: 8\n"  # the user's own comes first
    with pytest.raises(FileNotFoundError) as error:
        find_config("configs/refrence.yaml")
    assert "Did you mean reference.yaml?" in str(error.value)
    assert all(path.name in str(error.value) for path in CONFIGS.glob("*.yaml"))
    with pytest.raises(FileNotFoundError):
        find_config("elsewhere/reference.yaml")


def test_no_is_no_in_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("output_dir: x\neval_strategy: no\nsave_strategy: no\ndo_eval: no\n")
    (args,) = parse_arguments(TrainingArguments, [str(tmp_path / "a.yaml")])
    assert (args.eval_strategy, args.save_strategy, args.do_eval) == ("no", "no", False)


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("max_length: [1,\n")
    with pytest.raises(ValueError, match="a.yaml is not valid YAML"):
        parse_arguments(DataArguments, [str(tmp_path / "a.yaml")])


@pytest.mark.parametrize(
    "line, message",
    [
        ("seed: [1, 2]", r"seed is \[1, 2\]; it takes one value, as --seed does"),
        ("learning_rate: {a: 1}", r"learning_rate is {'a': 1}; it takes one value"),
        ("seed: 2026-01-01", "it takes one value"),
        ("weight_decay:", "weight_decay has no value"),
    ],
)
def test_a_value_of_another_shape_is_named(line, message, tmp_path):
    (tmp_path / "a.yaml").write_text(f"output_dir: x\n{line}\n")
    with pytest.raises(ValueError, match=f"a.yaml: {message}|{message}"):
        parse_arguments(TrainingArguments, [str(tmp_path / "a.yaml")])


def test_lists_mappings_and_nulls_go_where_they_are_taken(tmp_path):
    lines = ["output_dir: x", "report_to: [none]", "max_steps: 3", "warmup_steps: 1"]
    lines += ["lr_scheduler_kwargs: {a: 1}", "eval_steps:", "run_name:"]
    (tmp_path / "a.yaml").write_text("\n".join(lines))
    (args,) = parse_arguments(TrainingArguments, [str(tmp_path / "a.yaml")])
    assert (args.report_to, args.lr_scheduler_kwargs, args.eval_steps) == ([], {"a": 1}, None)
    (tmp_path / "b.yaml").write_text("model_name_or_path: [one, two]\ndata_dir: x")  # a list that must be given
    (args,) = parse_arguments(ProbingArguments, [str(tmp_path / "b.yaml")])
    assert args.model_name_or_path == ["one", "two"]


# ---- errors ----


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(), 141)])
def test_an_end_that_the_user_chose_is_no_error(error, code):
    """In a process of its own, whose output goes nowhere afterwards."""
    lines = f"from tjepa.corpus.command_line import start\ndef main(): raise {error!r}\nstart(main)"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.parametrize("error", [ValueError("two\nlines"), OSError("two\nlines"), ImportError("two lines")])
def test_an_error_of_the_users_is_one_line_and_exit_code_2(error, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tjepa pretrain"])
    # as if raised in this package
    monkeypatch.setattr("tjepa.corpus.command_line.PACKAGE", REPOSITORY / "tests")
    with pytest.raises(SystemExit) as end:
        start(fail(error))
    assert end.value.code == 2
    assert capsys.readouterr().err == "tjepa pretrain: error: two lines\n"
    monkeypatch.setattr(sys, "argv", ["tjepa pretrain", "--debug"])
    with pytest.raises(type(error)):
        start(fail(error))
    assert sys.argv == ["tjepa pretrain"]


class Failing(torch.utils.data.Dataset):
    def __getitem__(self, index):
        raise ValueError("two\nlines of a ValueError: x")

    def __len__(self):
        return 1


def test_an_error_in_a_worker_is_the_users_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tjepa pretrain"])
    monkeypatch.setattr("tjepa.corpus.command_line.PACKAGE", REPOSITORY / "tests")
    with pytest.raises(SystemExit):
        start(lambda: list(torch.utils.data.DataLoader(Failing(), num_workers=1)))
    assert capsys.readouterr().err == "tjepa pretrain: error: two lines of a ValueError: x\n"
    monkeypatch.setattr("tjepa.corpus.command_line.PACKAGE", REPOSITORY / "corpus")
    with pytest.raises(ValueError, match="Caught ValueError in DataLoader worker"):
        start(lambda: list(torch.utils.data.DataLoader(Failing(), num_workers=1)))


def test_an_error_of_a_librarys_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("tjepa.corpus.command_line.PACKAGE", REPOSITORY / "corpus")
    monkeypatch.setattr(sys, "argv", ["x", "--debug", "underflow_overflow"])
    with pytest.raises(ValueError):
        start(fail(ValueError("a bug")))
    assert sys.argv == ["x", "--debug", "underflow_overflow"]  # the flag of TrainingArguments


def test_combinations_that_training_arguments_refuse_are_the_users():
    with pytest.raises(ValueError) as error:
        parse_arguments(TrainingArguments, ["--output_dir=x", "--load_best_model_at_end", "--save_strategy=epoch"])
    assert error.traceback[-1].path.name == "arguments.py"


def test_every_command_started_as_a_file_ends_in_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY.parent)}
    command = [sys.executable, REPOSITORY / "run_pretraining.py", "--train_fil", "x"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "run_pretraining.py: error: There is no argument --train_fil. Did you mean --train_file?\n"


def test_arguments_of_the_preparation_are_in_its_help(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(PreparationArguments, ["--help"], description="Prepares.\n\nMore.")
    out = capsys.readouterr().out
    assert "Prepares. A YAML file" in out and "More." not in out and "--deduplicate" in out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--masking_strategies=ul3"], "ul3"),
        (["--views_per_document=99"], "views_per_document"),
        (["--row_length=128", "--max_length=256"], "--row_length 128 is too short for --max_length 256"),
        (["--row_length=8", "--segment_length=16"], "--row_length 8 is too short for --segment_length 16"),
        (["--config_overrides=hiden_size=64"], "hiden_size"),
        (["--train_file=x.txt", "--tokenizer_name=./nowhere"], "--tokenizer_name ./nowhere"),
        (["--train_file=x.txt"], "Which tokenizer"),
        (["--dataset_name=data/tinystories"], "tjepa prepare configs/prepare_tinystories.yaml"),
    ],
)
def test_what_needs_no_data_is_checked_before_data_is_read(flags, message, tmp_path, monkeypatch):
    def read(*args, **kwargs):
        raise AssertionError("data were read")

    monkeypatch.setattr(run_pretraining, "load_documents", read)
    monkeypatch.setattr(sys, "argv", ["x", *flags, f"--output_dir={tmp_path}", "--use_cpu=true"])
    with pytest.raises((ValueError, OSError), match=message):
        run_pretraining.main()


# ---- threads ----


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ({"GOMP_SPINCOUNT": "0"}, {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}),
    ],
)
def test_threads_that_wait_spin_briefly(chosen, expected, monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back, too
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["tjepa pretrain", "--use_cpu"])
    answer_early("pretrain")
    assert {name: os.environ[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in os.environ} == expected


def test_threads_follow_the_cores_that_are_left(monkeypatch):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {2, 5, 7}, raising=False)
    assert available_cores() == 3
    with monkeypatch.context() as patch:  # a container's quota, which joblib reads
        patch.setattr(joblib, "cpu_count", lambda: 1)
        assert available_cores() == 1
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert available_cores() == 2
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    use_all_cores(SimpleNamespace(world_size=1))
    assert chosen == [2]
