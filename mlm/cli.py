"""Command lines made of the modules' configurations: a field of a dataclass is a flag, its comment the help.

    mlm/data/masking.py:  mlm_probability: float = 0.15  # Predict this share of the tokens.
    command line:         --mlm_probability 0.2

`--config FILE.yaml` sets flags, and the command line wins. Its values pass as text through argparse, so that `5e-5` is
a number and `no` is what the flag makes of it (YAML reads a string and a boolean). Others need as much code:
tyro 1.0 has no such file, jsonargparse 4.53 no comments as help, HfArgumentParser no `int | Literal["auto"]`."""

import argparse
import ast
import dataclasses
import difflib
import inspect
import io
import json
import logging
import os
import shutil
import signal
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from mlm.engine.distributed import lost_a_process
from mlm.engine.memory import out_of_memory
from mlm.engine.signals import Stopped
from mlm.errors import UserError, one_line, printable

# The words for a boolean, and for None, in any case.
BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(("false", "no", "off", "0"), False)
NONES = dict.fromkeys(("none", "null", "~", ""))
# Flags of run_mlm_no_trainer.py that have no use here, with what to do instead.
GONE = {
    "use_slow_tokenizer": "leave it out: tokenizers are always the fast ones",
    "low_cpu_mem_usage": "leave it out: transformers saves that memory by itself",
    "hub_token": "log in with `hf auth login`, or set the environment variable HF_TOKEN",
}
# Earlier names of flags, and datasets' num_proc; the last two are still train.py's, and were evaluate.py's too.
GENERAL = ("file", "dataset_name", "dataset_config_name", "text_column")
RENAMED = {f"general_{rest}": f"out_of_domain_{rest}" for rest in GENERAL} | {"num_proc": "preprocessing_num_workers"}
RENAMED |= {name: f"eval_{name}" for name in ("mlm_probability", "whole_word_mask")}


class _OneOrSeveral(argparse.Action):
    def __call__(self, _: Any, values: argparse.Namespace, words: list[Any], flag: str | None = None) -> None:
        setattr(values, self.dest, words[0] if len(words) == 1 else tuple(words))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def parse(configs: Sequence[type], argv: Sequence[str], parser: argparse.ArgumentParser) -> list[Any]:
    """Reads `argv` into an instance of each dataclass, in their order; last, the namespace of all values. Positional
    arguments may stand between flags. Raises UserError on an unknown flag or a value that does not convert."""
    words = [action.metavar or action.dest for action in parser._actions if not action.option_strings]
    parser.usage = " ".join(["%(prog)s", *words, "[--flag value …]"])
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    in_a_file = "Set any of these flags in a file; flags win over it."
    parser.add_argument("--config", metavar="FILE.yaml", action="append", default=[], help=in_a_file)
    parser.add_argument("--json", action="store_true", help="End with one line of JSON on a terminal too.")
    for config in configs:
        _add_flags(parser.add_argument_group(config.__doc__.partition("\n")[0].rstrip(".")), config)
    files = parser.parse_known_intermixed_args(argv)[0].config
    in_files = [flag for path in files for flag in _flags_of(path, parser)]
    values, unknown = parser.parse_known_intermixed_args([*in_files, *argv])
    for word in unknown:
        if word.startswith("-"):
            raise UserError(_unknown(word.partition("=")[0], parser))
    if unknown:
        raise UserError(f"{unknown[0]!r} belongs to no flag; --help lists the flags")
    for name, value in vars(values).items():
        text = "".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if "\0" in text or text != text.encode(errors="replace").decode():
            raise UserError(f"--{name} {value!a}: a NUL, or no UTF-8, which libraries need (try PYTHONUTF8=1)")
    instances = [config(**{f.name: getattr(values, f.name) for f in dataclasses.fields(config)}) for config in configs]
    return [*instances, values]


def parse_config(config: type, argv: Sequence[str], description: str | None = None) -> Any:
    """Reads `argv` into a `Config`, or a fork's subclass of it: a dataclass whose fields are dataclasses."""
    return config(*parse([part.type for part in dataclasses.fields(config)], argv, command(description))[:-1])


def command(description: str | None) -> argparse.ArgumentParser:
    """The parser of a script: full flag names only, one-line errors, and commands in the help as they are indented."""
    width, parts = shutil.get_terminal_size().columns - 2, (description or "").split("\n\n")
    text = "\n\n".join(part if part.startswith("    ") else textwrap.fill(part, width) for part in parts)
    as_it_is = argparse.RawDescriptionHelpFormatter
    return _Parser(description=text, formatter_class=as_it_is, allow_abbrev=False, add_help=False)


def run(body: Callable[[Sequence[str]], dict[str, Any]], words: Callable[[dict[str, Any]], str] | None = None) -> None:
    """A script's outermost call: runs `body(argv)` and, on the main process, prints its result. The last line of
    standard output is the result as JSON, or on a terminal without --json `words(result)`. UserError becomes one line
    on standard error and exit status 2; `accelerate launch` adds a traceback and exits with 1."""
    is_main = os.environ.get("RANK", "0") == "0"
    for name in ("stdout", "stderr"):  # take any character, and are there: `>&-` closes them
        if getattr(sys, name) is None:
            setattr(sys, name, io.TextIOWrapper(io.FileIO(os.devnull, "w")))
        getattr(sys, name).reconfigure(errors="backslashreplace")
    logging.basicConfig(format="%(message)s", level=logging.ERROR, stream=sys.stderr)
    logging.getLogger("mlm").setLevel(logging.INFO if is_main else logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    try:
        _check_surroundings()
        result = body(sys.argv[1:])
        with suppress(OSError) if "output_dir" in result else nullcontext():  # where the figures are, too
            if is_main and ("--json" in sys.argv or not sys.stdout.isatty()):
                print(json.dumps(result, default=str), flush=True)
            elif is_main and words is not None:
                print(words(result), flush=True)
    except BrokenPipeError:  # `| head` has seen enough
        sys.exit(128 + signal.SIGPIPE)
    except (KeyboardInterrupt, Stopped) as stop:
        if is_main:
            _complain(str(stop) or "interrupted")
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))
    except Exception as error:
        if (mistake := _mistake(error)) is None:
            raise
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(2)  # a launcher names the first that fails, and ends the others: let that be the main process
        _complain(f"error: {mistake}")
        if lost_a_process(error):
            os._exit(1)  # at once: an orderly end would wait for the process that is gone
        sys.exit(2)
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):  # at exit it would be an error, with a status of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _complain(line: str) -> None:
    with suppress(OSError):  # of a terminal that is closed
        print(printable(line), file=sys.stderr, flush=True)


def _check_surroundings() -> None:
    """Raises UserError for what no script can work with."""
    if sys.platform == "win32":
        raise UserError("Windows is not supported; use Linux, macOS or the Windows Subsystem for Linux")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not os.environ.get(name, "0").isdecimal():
            raise UserError(f"the environment variable {name} is {os.environ[name]!r} and no number; unset it")
    if int(os.environ.get("RANK", "0")) >= int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError("the environment variable RANK is not below WORLD_SIZE; unset both, or launch with torchrun")


def _mistake(error: Exception) -> str | None:
    """The line for an error that the user can mend; None for another one."""
    if out_of_memory(error):
        advice = "use smaller batches (--per_device_eval_batch_size, --per_device_train_batch_size)"
        return f"out of memory ({one_line(error, 200)}); {advice} or a shorter --max_seq_length"
    if lost_a_process(error):
        reason = "another process of the run has ended; the reason, if it printed one, is in its output"
        resumes = "--resume_from_checkpoint latest resumes from the last checkpoint, if it has written one"
        return f"process {os.environ.get('RANK', '0')} ends because {reason}; {resumes}"
    if isinstance(error, OSError) and error.errno is not None:  # too long a name, a loop of links, no permission, …
        return f"{one_line(error.filename or 'a file or standard output')}: {error.strerror}"
    loop = isinstance(error, RuntimeError) and str(error).startswith("Symlink loop")
    return str(error) if loop or isinstance(error, UserError) else None


def _add_flags(group: argparse._ArgumentGroup, config: type) -> None:
    """A flag for each field; its comment may stand on any line of its definition, as the formatter has put it."""
    lines, hints = textwrap.dedent(inspect.getsource(config)).splitlines(), typing.get_type_hints(config)
    nodes = {n.target.id: n for n in ast.parse("\n".join(lines)).body[0].body if isinstance(n, ast.AnnAssign)}
    for field in dataclasses.fields(config):
        hint, default, node = hints[field.name], field.default, nodes[field.name]
        comment = " ".join(line.partition("  # ")[2] for line in lines[node.lineno - 1 : node.end_lineno]).strip()
        shown = str(default).lower() if hint is bool else default
        text = comment + ("" if default is None else f" (default: {shown})")
        group.add_argument(f"--{field.name}", default=default, help=text.replace("%", "%%"), **_conversion(hint))


def _conversion(hint: Any) -> dict[str, Any]:
    """How argparse reads and shows a field's type: int | Literal["auto"] | None reads 3, auto, none; as INT|auto."""
    readers: list[Callable[[str], Any]] = []
    shown: list[str] = []
    more: dict[str, Any] = {"nargs": "?", "const": True} if hint is bool else {}
    for kind in typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else [hint]:
        if typing.get_origin(kind) is Literal:
            readers.append({word: word for word in typing.get_args(kind)}.__getitem__)
            shown += typing.get_args(kind)
        elif kind is bool:
            readers.append(lambda text: BOOLEANS[text.lower()])
            shown.append("true|false")
        elif typing.get_origin(kind) is tuple:  # of what the other kinds are
            more = {"nargs": "+", "action": _OneOrSeveral}
        elif kind is types.NoneType:
            readers.insert(0, lambda text: NONES[text.lower()])
        else:
            readers.append(kind)
            shown.append(kind.__name__.upper())

    def read(text: str) -> Any:
        for reader in readers:
            with suppress(ValueError, KeyError):
                return reader(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {'|'.join(shown)}")

    return {"type": read, "metavar": "|".join(shown), **more}


def _flags_of(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """The flags that stand in a YAML file."""
    try:
        # The base loader leaves every value the text that it is in the file.
        values = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
        if not isinstance(values, dict):
            raise UserError("expected lines of the form `flag_name: value`")
        flags: list[str] = []
        for name, value in values.items():
            if f"--{name}" not in parser._option_string_actions or name in ("config", "help", "json"):
                raise UserError(_unknown(name, parser))
            several = isinstance(value, list) and parser._option_string_actions[f"--{name}"].nargs == "+"
            if not (isinstance(value, str) or (several and all(isinstance(word, str) for word in value))):
                raise UserError(f"{name} takes one value, not a list or a mapping")
            flags += [f"--{name}", *value] if several else [f"--{name}={value}"]
        parser.parse_known_intermixed_args(flags)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: not a YAML file ({one_line(error)})") from None
    except (OSError, UserError) as error:
        raise UserError(f"--config {path}: {getattr(error, 'strerror', error)}") from None
    return flags


def _unknown(flag: str, parser: argparse.ArgumentParser) -> str:
    """What to use in place of a flag, written with or without its dashes, that is not known."""
    name, known = flag.lstrip("-"), parser._option_string_actions
    if name in GONE:
        return f"{flag} is gone; {GONE[name]}"
    if f"--{RENAMED.get(name)}" in known:
        return f"{flag} is now --{RENAMED[name]}"
    close = difflib.get_close_matches(f"--{name}", known.keys() - {"--help"}, n=1)
    advice = f"did you mean {close[0]}?" if close else "--help lists the known ones"
    return f"unknown flag {flag}; {advice}"
