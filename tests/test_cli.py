"""Claims about command lines: what a person writes, there or in a file, is what a configuration holds."""

import dataclasses
import json
import os
import pty
import subprocess
import sys
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm import cli
from mlm.config import Config
from mlm.data.corpus import OutOfDomainConfig
from mlm.data.token_store import TokenStoreConfig
from mlm.errors import UserError
from mlm.evaluation.eval_set import EvaluateConfig
from tests.conftest import REPOSITORY
from tests.scripts import load_script

FLAGS = [
    (module, field)
    for module in (part.type for part in dataclasses.fields(Config))
    for field in dataclasses.fields(module)
]
ZERO_IS_FINE = {"num_warmup_steps", "seed", "eval_mask_seed"}
SEEDS = {"seed", "eval_mask_seed"}
CHECKED_LATER = {"validation_split_percentage"}  # as it does not matter where a dataset brings its own split


@dataclass(frozen=True)
class Bread:
    flour: str | None = None  # its kind
    loaves: int = 1  # how many; 100% of them are baked
    water: float = 0.7  # share of the flour's weight
    rests: int | Literal["overnight"] | None = None  # minutes, or until tomorrow
    crust: Literal["soft", "hard"] = "hard"  # how it sounds
    toppings: str | tuple[str, ...] | None = None  # on it, one or several
    slices: float | tuple[float, ...] = 0.5  # their thickness
    salted: bool = True  # with salt
    very_long_name_that_makes_the_formatter_put_the_value_into_parentheses: float = 5.0  # a comment inside of them
    seeds: Literal[
        "none", "sesame"
    ] = "none"  # a comment behind the last of several lines  # fmt: skip


def read(*argv: str) -> Bread:
    return cli.parse([Bread], argv, cli.command("Bakes bread."))[0]


def read_file(text: str, folder: Path, *argv: str) -> Bread:
    (folder / "bread.yaml").write_text(text, encoding="utf-8")
    return read("--config", str(folder / "bread.yaml"), *argv)


def help_of(modules) -> dict[str, str]:
    """flag -> its line of the help, as argparse holds it"""
    parser = cli.command("")
    cli.parse(modules, [], parser)
    return {action.dest: action.help for action in parser._actions}


def test_without_flags_the_defaults_stand():
    assert read() == Bread()


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], True),
        (["--salted"], True),
        (["--salted", "true"], True),
        (["--salted", "false"], False),
        (["--salted=no"], False),
        (["--salted", "0"], False),
        (["--salted", "Off"], False),
        (["--salted=false", "--salted"], True),
        (["--salted", "--loaves", "1"], True),
    ],
)
def test_booleans_read_as_a_person_expects(argv, value):
    assert read(*argv).salted is value


@pytest.mark.parametrize(
    ("word", "value"), [("30", 30), ("overnight", "overnight"), ("none", None), ("null", None), ("", None)]
)
def test_a_number_a_word_and_none_can_share_a_flag(word, value):
    found = read("--rests=5", "--rests", word).rests
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("argv", "in_a_file", "toppings"),
    [
        (["--toppings", "jam"], "toppings: jam", "jam"),
        (["--toppings=jam"], "toppings: [jam]", "jam"),
        (["--toppings", "jam", "butter"], "toppings: [jam, butter]", ("jam", "butter")),
        (["--toppings", "none"], "toppings: null", None),
    ],
)
def test_a_flag_can_take_one_value_or_several(argv, in_a_file, toppings, tmp_path):
    found = read(*argv, "--slices", "0.1", "2", "--loaves", "3")
    assert found == Bread(loaves=3, toppings=toppings, slices=(0.1, 2.0))
    assert read_file(in_a_file, tmp_path) == Bread(toppings=toppings)
    assert read_file(in_a_file, tmp_path, "--toppings", "cheese").toppings == "cheese"


def test_none_unsets_a_text_and_is_a_word_where_it_is_one_of_the_choice():
    assert read("--flour=rye", "--flour", "none").flour is None
    assert read("--seeds", "none").seeds == "none"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--loaves", "two"], "--loaves: 'two' is not INT"),
        (["--loaves", "1.5"], "--loaves: '1.5' is not INT"),
        (["--rests", "never"], "--rests: 'never' is not INT|overnight"),
        (["--crust", "burnt"], "--crust: 'burnt' is not soft|hard"),
        (["--salted", "maybe"], "--salted: 'maybe' is not true|false"),
        (["--loaves"], "--loaves: expected one argument"),
        (["--slices"], "--slices: expected at least one argument"),
        (["--slices", "1", "thick"], "--slices: 'thick' is not FLOAT"),
        (["--loafs", "2"], "unknown flag --loafs; did you mean --loaves?"),
        (["--loafs=2"], "unknown flag --loafs; did you mean --loaves?"),
        (["--loav", "2"], "unknown flag --loav; did you mean --loaves?"),
        (["--zzz"], "unknown flag --zzz; --help lists the known ones"),
        (["--hlp"], "unknown flag --hlp; --help lists the known ones"),
        (["--use_slow_tokenizer"], f"--use_slow_tokenizer is gone; {cli.GONE['use_slow_tokenizer']}"),
        (["--low_cpu_mem_usage=1"], f"--low_cpu_mem_usage is gone; {cli.GONE['low_cpu_mem_usage']}"),
        (["--hub_token", "x"], f"--hub_token is gone; {cli.GONE['hub_token']}"),
        (["rye"], "'rye' belongs to no flag; --help lists the flags"),
    ],
)
def test_a_mistake_is_named(argv, message):
    with pytest.raises(UserError) as raised:
        read(*argv)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("old", "modules", "new"),
    [
        ("general_file", [OutOfDomainConfig], "out_of_domain_file"),
        ("general_dataset_name", [OutOfDomainConfig], "out_of_domain_dataset_name"),
        ("general_dataset_config_name", [OutOfDomainConfig], "out_of_domain_dataset_config_name"),
        ("general_text_column", [OutOfDomainConfig], "out_of_domain_text_column"),
        ("num_proc", [TokenStoreConfig], "preprocessing_num_workers"),
        ("mlm_probability", [EvaluateConfig], "eval_mlm_probability"),
        ("whole_word_mask", [EvaluateConfig], "eval_whole_word_mask"),
    ],
)
def test_an_earlier_name_of_a_flag_is_answered_with_the_present_one(old, modules, new, tmp_path):
    """On the command line and in a file, and only where there is a flag of that name."""
    with pytest.raises(UserError, match=f"^--{old} is now --{new}$"):
        cli.parse(modules, [f"--{old}", "0.3"], cli.command(""))
    (tmp_path / "run.yaml").write_text(f"{old}: 0.3\n")
    with pytest.raises(UserError, match=f"run.yaml: {old} is now --{new}$"):
        cli.parse(modules, [f"--config={tmp_path}/run.yaml"], cli.command(""))
    with pytest.raises(UserError, match=f"^unknown flag --{old}; "):
        cli.parse([Bread], [f"--{old}", "0.3"], cli.command(""))


def test_positional_arguments_may_stand_between_flags():
    parser = cli.command("")
    parser.add_argument("guests", nargs="*")
    argv = ["Ann", "--loaves", "3", "a man - Bob", "--water=0.6", "Cy"]
    bread, rest = cli.parse([Bread], argv, parser)
    assert (bread.loaves, bread.water, rest.guests) == (3, 0.6, ["Ann", "a man - Bob", "Cy"])


@pytest.mark.parametrize(
    ("line", "flag", "value"),
    [
        ("water: 5e-5", "water", 5e-5),
        ("loaves: 3", "loaves", 3),
        ("loaves: 010", "loaves", 10),
        ("salted: false", "salted", False),
        ("salted: no", "salted", False),
        ("flour: no", "flour", "no"),
        ("flour: '1e3'", "flour", "1e3"),
        ("flour: null", "flour", None),
        ("flour:", "flour", None),
        ("rests: ~", "rests", None),
        ("rests: overnight", "rests", "overnight"),
        ("flour: -rye=1  # a remark", "flour", "-rye=1"),
        ("flour: Roggenbrötchenmehl", "flour", "Roggenbrötchenmehl"),
    ],
)
def test_a_file_sets_a_flag_as_the_command_line_would(line, flag, value, tmp_path):
    found = getattr(read_file(line, tmp_path), flag)
    assert (found, type(found)) == (value, type(value))


@given(st.floats(allow_nan=False), st.integers(-(10**12), 10**12), st.booleans())
def test_numbers_come_back_from_a_file_as_they_were(tmp_path_factory, water, loaves, salted):
    text = f"water: {water!r}\nloaves: {loaves}\nsalted: {str(salted).lower()}\n"
    bread = read_file(text, tmp_path_factory.getbasetemp())
    assert (bread.water, bread.loaves, bread.salted) == (water, loaves, salted)


@pytest.mark.parametrize("before", [True, False])
def test_flags_win_over_the_file_wherever_they_stand(before, tmp_path):
    path = tmp_path / "bread.yaml"
    path.write_text("loaves: 3\nwater: 0.6\n")
    flags, file = ["--loaves=4"], [f"--config={path}"]
    bread = read(*flags, *file) if before else read(*file, *flags)
    assert (bread.loaves, bread.water) == (4, 0.6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loafs: 3", "unknown flag loafs; did you mean --loaves?"),
        ("help: true", "unknown flag help"),
        ("config: other.yaml", "unknown flag config"),
        ("loaves: two", "--loaves: 'two' is not INT"),
        ("loaves: [1, 2]", "loaves takes one value"),
        ("loaves: {a: 1}", "loaves takes one value"),
        ("toppings: [[jam]]", "toppings takes one value"),
        ("slices: []", "--slices: expected at least one argument"),
        ("- loaves", "flag_name: value"),
        ("", "flag_name: value"),
        ("loaves: 1\n  water: : 2", "line 2"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(text, words, tmp_path):
    with pytest.raises(UserError) as raised:
        read_file(text, tmp_path)
    message = str(raised.value)
    assert message.startswith(f"--config {tmp_path / 'bread.yaml'}: ")
    assert words in message
    assert "\n" not in message


def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"--config none\.yaml: No such file"):
        read("--config", "none.yaml")
    (tmp_path / "bread.yaml").write_bytes(b"flour: caf\xe9")
    with pytest.raises(UserError, match=r"bread\.yaml: not a YAML file"):
        read("--config", str(tmp_path / "bread.yaml"))


def test_the_help_of_a_flag_is_its_comment_wherever_the_formatter_put_it():
    texts = help_of([Bread])
    assert texts["flour"] == "its kind"
    assert texts["loaves"] == "how many; 100%% of them are baked (default: 1)"
    name = "very_long_name_that_makes_the_formatter_put_the_value_into_parentheses"
    assert texts[name] == "a comment inside of them (default: 5.0)"
    assert texts["seeds"].startswith("a comment behind the last of several lines")


@pytest.mark.parametrize(("module", "field"), FLAGS, ids=[field.name for _, field in FLAGS])
def test_every_flag_of_a_run_has_a_help_text(module, field):
    assert len(help_of([module])[field.name].partition(" (default")[0]) >= 8


CONFIGS = [*(part.type for part in dataclasses.fields(Config)), load_script("fill_mask").FillMaskConfig]


@pytest.mark.parametrize("module", [*CONFIGS, load_script("evaluate").CheckpointToMeasure])
def test_the_help_is_whole_sentences_under_the_first_line_of_the_modules_docstring(module):
    """Titles are phrases."""
    parser = cli.command("")
    cli.parse([module], [], parser)
    [*_, group] = parser._action_groups
    assert group.title == module.__doc__.splitlines()[0].rstrip(".")
    assert group.title[0].isupper() and "(" not in group.title  # as in what dataclass makes up by itself
    for text in help_of([module]).values():
        sentence = text.partition(" (default: ")[0] if text.endswith(")") else text
        assert sentence[0].isupper() and sentence.endswith("."), sentence


def test_a_command_in_the_help_can_be_copied_and_prose_is_as_wide_as_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    usage = "    python bake.py --crust hard \\\n        --loaves 2"
    text = cli.command(f"Bakes bread.\n\n{usage}\n\n{'It rises. ' * 20}").format_help()
    assert f"\n\n{usage}\n\n" in text
    assert max(map(len, text.splitlines())) <= 60


def test_no_two_modules_share_a_flag():
    names = [field.name for _, field in FLAGS]
    assert len(names) == len(set(names))


def test_a_run_reads_back_from_its_own_flags():
    argv = ["--learning_rate", "1e-4", "--whole_word_mask", "--eval_steps=50", "--max_seq_length", "256"]
    config = cli.parse_config(Config, argv)
    assert (config.optimizer.learning_rate, config.train.eval_steps) == (1e-4, 50)
    assert (config.masking.whole_word_mask, config.chunks.max_seq_length) == (True, 256)
    assert cli.parse_config(Config, []) == Config()


def takes(kind: type, module: type, name: str) -> bool:
    hint = typing.get_type_hints(module)[name]
    return kind in (hint, *typing.get_args(hint))


COUNTS = [(module, field.name) for module, field in FLAGS if takes(int, module, field.name)]


@pytest.mark.parametrize(("module", "name"), COUNTS, ids=[name for _, name in COUNTS])
def test_every_count_has_a_least_value(module, name):
    for value in [0] * (name not in ZERO_IS_FINE) + [-1] * (name not in SEEDS):
        with pytest.raises(UserError, match=f"^--{name} {value}: "):
            cli.parse([module], [f"--{name}={value}"], cli.command(""))


NUMBERS = [
    (module, field.name)
    for module, field in FLAGS
    if takes(float, module, field.name) and field.name not in CHECKED_LATER
]


@pytest.mark.parametrize("value", ["-0.5", "nan", "inf"])
@pytest.mark.parametrize(("module", "name"), NUMBERS, ids=[name for _, name in NUMBERS])
def test_no_number_is_negative_infinite_or_none(module, name, value):
    with pytest.raises(UserError, match=f"^--{name} {value}"):
        cli.parse([module], [f"--{name}={value}"], cli.command(""))


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        *((name, "--model_name_or_path") for name in ("train.py", "evaluate.py", "fill_mask.py", "prepare.py")),
        ("demo.py", "--output_dir"),
        ("report.py", "--sentences_file"),
    ],
)
def test_every_script_explains_itself_without_waiting_for_the_libraries(script, flag):
    """The seconds until the help is there would be theirs."""
    command = [sys.executable, "-X", "importtime", str(REPOSITORY / "scripts" / script), "--help"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "argparse" in imported
    own = {"torch._C", "transformers.dependency_versions_check", "datasets.arrow_dataset", "pyarrow.lib", "pandas"}
    own |= {"accelerate.big_modeling", "tokenizers.decoders", "safetensors._safetensors_rust", "sklearn.base"}
    own |= {"huggingface_hub.constants", "_plotly_utils.importers"}
    assert not imported & own, "what the libraries import themselves"
    assert all(line.startswith("import time:") for line in run.stderr.splitlines())
    assert flag in run.stdout
    assert "--config FILE.yaml" in run.stdout


BAKES = """
from mlm import cli
cli.run(lambda argv: {"loaves": 3}, lambda result: f"{result['loaves']} loaves")
"""


@pytest.mark.parametrize(
    ("flags", "terminal", "printed"),
    [([], True, "3 loaves"), (["--json"], True, '{"loaves": 3}'), ([], False, '{"loaves": 3}')],
    ids=["terminal", "terminal --json", "pipe"],
)
def test_a_person_on_a_terminal_reads_words_and_a_program_json(flags, terminal, printed):
    reading, writing = pty.openpty() if terminal else os.pipe()
    with open(reading, errors="replace") as screen:
        subprocess.run([sys.executable, "-c", BAKES, *flags], cwd=REPOSITORY, stdout=writing, check=True)
        if terminal:
            assert screen.readline().rstrip() == printed
        os.close(writing)
        assert terminal or screen.read() == printed + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_each_launcher_runs_the_script_and_nothing_else_speaks(launcher, toy, tmp_path):
    """The last line of standard output is JSON, and standard error is empty where no bar can be drawn."""
    command = {
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1",
                       "--mixed_precision=no", "--dynamo_backend=no"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"],
    }[launcher]  # fmt: skip
    environment = dict(os.environ)
    if launcher == "accelerate":  # which is told by --cpu alone that its one process has no GPU
        environment.pop("ACCELERATE_USE_CPU", None)
    script = str(REPOSITORY / "scripts" / "train.py")
    run = subprocess.run(
        [sys.executable, *command, script, *toy.flags(tmp_path / "run", max_train_steps=2)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert json.loads(run.stdout.splitlines()[-1])["steps"] == 2


def test_a_reader_who_has_seen_enough_costs_no_traceback(tmp_path):
    """As in `script | head -1`, the script going on for longer than a pipe holds."""
    program = tmp_path / "program.py"
    program.write_text("""
from mlm import cli
def body(argv):
    for number in range(100_000):
        print(number)
    return {}
cli.run(body)
""")
    command = f"{sys.executable} {program} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n141\n", "")
