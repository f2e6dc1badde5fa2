"""Command lines made of the modules' configurations: a field of a dataclass is a flag, its comment the help.

    mlm/data/masking.py:  mlm_probability: float = 0.15  # Predict this share of the tokens.
    command line:         --mlm_probability 0.2

`--config FILE.yaml` sets any flag. Its values stay the words that stand in the file and pass through argparse
as the flags do, so that `5e-5` is a number and `no` is what the flag makes of it (to YAML they are a string
and a boolean), and flags win because they come after.

Other libraries would need as much code around them: tyro 1.0 has no flag that is both `--salted` and `--salted
false`, no configuration file, and errors of several lines; jsonargparse 4.53 asks `--salted` for a value and takes no
comment as help; HfArgumentParser keeps `5e-5` a string and knows no `int | Literal["auto"]`.
"""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import json
import logging
import os
import signal
import sys
import textwrap
import time
import tokenize
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from mlm.engine.distributed import lost_a_process
from mlm.engine.signals import Stopped
from mlm.engine.update import out_of_memory
from mlm.errors import UserError, one_line

# Flags of run_mlm_no_trainer.py that have no use here, with what to do instead.
GONE = {
    "use_slow_tokenizer": "leave it out: tokenizers are always the fast ones",
    "low_cpu_mem_usage": "leave it out: transformers saves that memory by itself",
    "hub_token": "log in with `hf auth login`, or set the environment variable HF_TOKEN",
}
# Earlier names of flags. The last two are train.py's own, and earlier names in evaluate.py.
RENAMED = {
    "general_file": "out_of_domain_file",
    "general_dataset_name": "out_of_domain_dataset_name",
    "general_dataset_config_name": "out_of_domain_dataset_config_name",
    "general_text_column": "out_of_domain_text_column",
    "mlm_probability": "eval_mlm_probability",
    "whole_word_mask": "eval_whole_word_mask",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse(configs: Sequence[type], argv: Sequence[str], parser: argparse.ArgumentParser) -> list[Any]:
    """Reads `argv` into an instance of each dataclass, in their order; last, the namespace of all values.

    Positional arguments may stand between flags. Raises UserError on an unknown flag (naming the nearest
    known one) and on a value that does not convert.
    """
    words = [action.metavar or action.dest for action in parser._actions if not action.option_strings]
    parser.usage = " ".join(["%(prog)s", *words, "[--flag value …]"])
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Set any of these flags in this file; flags win over the file."
    )
    parser.add_argument("--json", action="store_true", help="End with one line of JSON on a terminal too.")
    for config in configs:
        _add_flags(parser.add_argument_group(config.__doc__.partition("\n")[0].rstrip(".")), config)
    known = [option for action in parser._actions for option in action.option_strings]

    values, unknown = parser.parse_known_intermixed_args([*_file_flags(argv, parser, known), *argv])
    for word in unknown:
        if word.startswith("-"):
            raise UserError(_unknown(word.partition("=")[0], known))
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no flag; --help lists the flags")

    instances = []
    for config in configs:
        names = [field.name for field in dataclasses.fields(config)]
        instances.append(config(**{name: getattr(values, name) for name in names}))
    return [*instances, values]


def parse_config(config: type, argv: Sequence[str], description: str | None = None) -> Any:
    """Reads `argv` into a `Config`, or a fork's subclass of it: a dataclass whose fields are dataclasses."""
    parts = parse([part.type for part in dataclasses.fields(config)], argv, command(description))
    return config(*parts[:-1])


def command(description: str | None) -> argparse.ArgumentParser:
    """The parser of a script: full flag names only, and one-line errors."""
    return _Parser(description=description, allow_abbrev=False, add_help=False)


def run(body: Callable[[Sequence[str]], dict[str, Any]], words: Callable[[dict[str, Any]], str] | None = None) -> None:
    """A script's outermost call: runs `body(argv)` and prints its result.

    The last line of standard output is the result as one JSON object, unless that is a terminal and --json is
    not given: there a person reads `words(result)`, or what `body` has printed. Only the main process prints.

    A UserError becomes one line on standard error, once a machine, and exit status 2. `accelerate launch`
    adds a traceback of its own (not with its --quiet), and exits with 1.
    """
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(format="%(message)s", level=logging.ERROR, stream=sys.stderr)
    logging.getLogger("mlm").setLevel(logging.INFO if is_main else logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        if sys.platform == "win32":
            raise UserError("Windows is not supported; use Linux, macOS or the Windows Subsystem for Linux")
        result = body(sys.argv[1:])
        if is_main and ("--json" in sys.argv or not sys.stdout.isatty()):
            print(json.dumps(result, default=str), flush=True)
        elif is_main and words is not None:
            print(words(result), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more can be written at exit
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Stopped as stopped:
        if is_main:
            print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.number)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            print(
                f"error: out of memory ({one_line(error, 200)}); use smaller batches "
                "(--per_device_eval_batch_size, --per_device_train_batch_size) or a shorter --max_seq_length",
                file=sys.stderr,
            )
            sys.exit(2)
        if not lost_a_process(error):
            raise
        _end_after_another(is_main)
    except UserError as error:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr)
        else:  # a launcher ends all at the first that fails: let that be the one that prints the reason
            time.sleep(2)
        sys.exit(2)


def _end_after_another(is_main: bool) -> NoReturn:
    """Ends this process because another one of the run is gone."""
    if not is_main:  # a launcher names the first that fails: let that be one with more to print
        time.sleep(2)
    print(
        f"error: process {os.environ.get('RANK', '0')} ends because another process of the run has ended; "
        "the reason, if it printed one, is in its output; --resume_from_checkpoint latest resumes from the "
        "last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # at once: an orderly end would wait for the process that is gone


def _add_flags(group: argparse._ArgumentGroup, config: type) -> None:
    comments = _comments(config)
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        hint, default = hints[field.name], field.default
        shown = str(default).lower() if hint is bool else default
        text = comments[field.name] + ("" if default is None else f" (default: {shown})")
        extra: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
        group.add_argument(
            f"--{field.name}",
            default=default,
            type=_converter(hint),
            metavar=_placeholder(hint),
            help=text.replace("%", "%%"),
            **extra,
        )


def _comments(config: type) -> dict[str, str]:
    """The comment of each field, wherever on the lines of its definition the formatter has put it."""
    source = textwrap.dedent(inspect.getsource(config))
    words = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {word.start[0]: word.string.lstrip("# ") for word in words if word.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {
        node.target.id: " ".join(text for line, text in comments.items() if node.lineno <= line <= node.end_lineno)
        for node in fields
    }


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """int | Literal["auto"] | None -> (int, Literal["auto"], NoneType)"""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _placeholder(hint: Any) -> str:
    words = []
    for kind in _alternatives(hint):
        if typing.get_origin(kind) is Literal:
            words += typing.get_args(kind)
        elif kind is not types.NoneType:
            words.append({bool: "true|false"}.get(kind, kind.__name__.upper()))
    return "|".join(words)


def _converter(hint: Any) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        kinds = _alternatives(hint)
        if types.NoneType in kinds and text.lower() in ("none", "null", "~", ""):
            return None
        for kind in kinds:
            if typing.get_origin(kind) is Literal:
                if text in typing.get_args(kind):
                    return text
            elif kind is bool:
                if text.lower() in ("true", "yes", "on", "1"):
                    return True
                if text.lower() in ("false", "no", "off", "0"):
                    return False
            elif kind is not types.NoneType:
                try:
                    return kind(text)
                except ValueError:
                    continue
        raise argparse.ArgumentTypeError(f"{text!r} is not {_placeholder(hint)}")

    return convert


def _file_flags(argv: Sequence[str], parser: argparse.ArgumentParser, known: Sequence[str]) -> list[str]:
    """The flags in the YAML files that --config names; of several files the later ones win."""
    flags = []
    for word, following in zip(argv, [*argv, None][1:], strict=True):
        if word == "--config" and following is not None:
            flags += _flags_of(following, parser, known)
        elif word.startswith("--config="):
            flags += _flags_of(word.removeprefix("--config="), parser, known)
    return flags


def _flags_of(path: str, parser: argparse.ArgumentParser, known: Sequence[str]) -> list[str]:
    try:
        # The base loader leaves every value the text that it is in the file.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file ({one_line(error)})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected lines of the form `flag_name: value`")
    for name, value in values.items():
        if f"--{name}" not in known or name in ("config", "help", "json"):
            raise UserError(f"--config {path}: {_unknown(name, known)}")
        if not isinstance(value, str):
            raise UserError(f"--config {path}: {name} takes one value, not a list or a mapping")
    flags = [f"--{name}={value}" for name, value in values.items()]
    try:
        parser.parse_known_intermixed_args(flags)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None
    return flags


def _unknown(flag: str, known: Sequence[str]) -> str:
    """What to use in place of a flag, written with or without its dashes, that is not known."""
    name = flag.lstrip("-")
    if name in GONE:
        return f"{flag} is gone; {GONE[name]}"
    if f"--{RENAMED.get(name)}" in known:
        return f"{flag} is now --{RENAMED[name]}"
    close = difflib.get_close_matches(f"--{name}", known, n=1)
    advice = f"did you mean {close[0]}?" if close else "--help lists the known ones"
    return f"unknown flag {flag}; {advice}"
