"""What the result of a run depends on: a checkpoint of another experiment is not resumed."""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

SIMPLE = (int, float, str, bool, tuple, list, dict, set, type(None))


def identity(function: Callable[..., Any]) -> str:
    """A function by its name and a fingerprint of its code, without comments and docstrings.

    Functions and constants of its module that it names count; of a functools.partial, arguments that are plain values.
    """
    if isinstance(function, functools.partial):
        arguments = _simple(function.keywords)
        return f"{identity(function.func)} {arguments}" if arguments else identity(function.func)
    digest = hashlib.sha256("\n".join(_parts(function, set())).encode()).hexdigest()[:12]
    return f"{getattr(function, '__name__', type(function).__name__)} {digest}"


def _parts(function: Any, seen: set[Any]) -> list[str]:
    if not isinstance(function, FunctionType) or function in seen:
        return [repr(type(function))]
    seen.add(function)
    parts = [_code(function)]
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType) and value.__module__ == function.__module__:
            parts += _parts(value, seen)
        elif isinstance(value, SIMPLE) and name in function.__globals__:
            parts.append(f"{name} = {value!r}")
    return parts


def _code(function: FunctionType) -> str:
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, ValueError):  # typed at a prompt, or a lambda amid a line
        return f"{function.__code__.co_code!r} {function.__code__.co_consts!r}"
    for node in ast.walk(definition):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(definition)


def optimizer_identity(optimizer: Optimizer, scheduler: LRScheduler, model: torch.nn.Module) -> list[str]:
    """An optimizer by its kind, its settings and the names of its parameters in their order; and its schedule."""
    names = {id(p): name for name, p in model.named_parameters()}
    held = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    settings = [_simple(group, without="params") for group in optimizer.param_groups]
    schedule = [identity(rule) for rule in getattr(scheduler, "lr_lambdas", ())] or _simple(vars(scheduler))
    digest = hashlib.sha256(repr([settings, held, schedule]).encode()).hexdigest()[:12]
    return [type(optimizer).__name__, type(scheduler).__name__, digest]


def _simple(values: dict[str, Any], without: str | None = None) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != without and isinstance(value, SIMPLE)}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each setting in which a saved experiment is not this one."""
    return [
        f"{name} {now.get(name)} (the checkpoint: {saved.get(name)})"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
