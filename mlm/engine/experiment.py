"""What the result of a run depends on: a checkpoint of another experiment is not resumed."""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import CodeType, EllipsisType, FunctionType
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

PLAIN = (int, float, complex, str, bytes, type(None), EllipsisType, torch.dtype)
SIMPLE = (*PLAIN, tuple, list, dict, set, frozenset, torch.Tensor, np.ndarray, np.generic)


def identity(function: Callable[..., Any]) -> str:
    """A function by its name and a fingerprint of its code, less comments and docstrings, what it is closed over, and
    functions and constants of its module that it names; of a functools.partial, by its plain arguments too."""
    if isinstance(function, functools.partial):
        arguments = _simple(dict(enumerate(function.args)) | function.keywords)
        return f"{identity(function.func)} {_text(arguments)}" if arguments else identity(function.func)
    digest = hashlib.sha256("\n".join(_parts(function, set())).encode()).hexdigest()[:12]
    return f"{getattr(function, '__name__', type(function).__name__)} {digest}"


def _parts(function: Any, seen: set[Any]) -> list[str]:
    if not isinstance(function, FunctionType) or function in seen:
        return [repr(type(function))]
    seen.add(function)
    codes, known = [function.__code__], function.__globals__
    for code in codes:  # and those of lambdas, comprehensions and functions in it
        codes += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    own = {name: known[name] for code in codes for name in code.co_names if name in known}
    own |= inspect.getclosurevars(function).nonlocals
    parts = [_code(function), _text([function.__defaults__, function.__kwdefaults__])]
    for name, value in own.items():
        if isinstance(value, FunctionType) and value.__module__ == function.__module__:
            parts += _parts(value, seen)
        elif isinstance(value, SIMPLE):
            parts.append(f"{name} = {_text(value)}")
    return parts


def _code(function: FunctionType) -> str:
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, ValueError):  # typed at a prompt, or a lambda amid a line
        return _text(function.__code__)
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(definition)


def optimizer_identity(optimizer: Optimizer, scheduler: LRScheduler, model: torch.nn.Module) -> list[str]:
    """An optimizer by its kind, its settings and the names of its parameters in their order; and its schedule."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    settings = [_simple(group, without="params") for group in optimizer.param_groups]
    digest = hashlib.sha256(_text([settings, held, _schedule(scheduler)]).encode()).hexdigest()[:12]
    return [type(optimizer).__name__, type(scheduler).__name__, digest]


def _schedule(scheduler: LRScheduler) -> list[str]:
    """Its rules, or else its settings."""
    return [identity(rule) for rule in getattr(scheduler, "lr_lambdas", ())] or [
        f"{name} {value if _plain(value) else _text(value)}" for name, value in _simple(vars(scheduler)).items()
    ]


def _plain(value: Any) -> bool:
    """Whether its repr is the same in every process: it has no address, and no order that depends on hashes."""
    if isinstance(value, dict):
        return all(map(_plain, (*value, *value.values())))
    if isinstance(value, set | frozenset):
        return all(isinstance(item, int | float) for item in value)
    return all(map(_plain, value)) if isinstance(value, list | tuple) else isinstance(value, PLAIN)


def _text(value: Any) -> str:
    """A value as text that is the same in every process: its repr where that is, other objects by their type."""
    if _plain(value):
        return repr(value)
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_text(key)}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, CodeType):
        return f"{value.co_code!r} {value.co_names} {_text(value.co_consts)}"
    if isinstance(value, torch.Tensor):  # the device synchronises here
        return _text([value.dtype, *value.shape, value.detach().cpu().reshape(-1).view(torch.uint8).numpy()])
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
    name = type(value).__name__
    return f"{name} {_schedule(value)}" if isinstance(value, LRScheduler) else name


def _simple(values: dict[str, Any], without: str | None = None) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != without and isinstance(value, SIMPLE)}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each setting in which a saved experiment is not this one."""
    return [
        f"{name} {now.get(name)} (the checkpoint: {saved.get(name)})"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
