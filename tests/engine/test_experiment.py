"""A function's identity changes with what it does, and with nothing else."""

import functools

from mlm.engine.experiment import differences, identity

TEMPERATURE = 2.0


def softened(x):
    return x / TEMPERATURE


def objective(x):
    return softened(x) + 1


def test_comments_and_docstrings_do_not_count():
    def one(x):
        return x + 1

    first = one

    def one(x):
        """Adds one."""
        # and one only
        return x + 1

    assert identity(first) == identity(one)


def test_code_constants_and_functions_of_the_module_count(monkeypatch):
    before = identity(objective)
    monkeypatch.setitem(globals(), "TEMPERATURE", 3.0)
    changed = identity(objective)
    assert changed != before
    monkeypatch.setitem(globals(), "softened", lambda x: x)
    assert identity(objective) not in (before, changed)


def test_of_a_partial_the_plain_arguments_count():
    bound = [identity(functools.partial(objective, temperature=t, model=object())) for t in (1, 1, 2)]
    assert bound[0] == bound[1] != bound[2]


def test_a_function_without_source_has_an_identity():
    here = {}
    exec("def typed(x): return x + 1", here)
    exec("def other(x): return x + 2", here)
    assert identity(here["typed"]).startswith("typed ")
    assert identity(here["typed"]).split()[1] != identity(here["other"]).split()[1]


def test_differences_name_both_values():
    assert differences({"seed": 1, "old": 2}, {"seed": 3}) == [
        "old None (the checkpoint: 2)",
        "seed 3 (the checkpoint: 1)",
    ]
