"""A function's identity changes with what it does, and with nothing else."""

import functools

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from mlm.engine.experiment import differences, identity, optimizer_identity

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


WORDS = [f"word{number}" for number in range(100)]
NOUNS, RULES = set(WORDS), [object(), softened]


def nouns(x):
    return NOUNS, RULES


def scheduled(make):
    """What identifies an AdamW of two parameters under the schedule that `make` gives it."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return optimizer_identity(optimizer, make(optimizer), model)


def warmed_up(optimizer, steps=5):
    warm_up = lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, lr_scheduler.CosineAnnealingLR(optimizer, steps)], [5])


def identities(words):
    typed = {}
    exec(f"def typed(x): return [x in {{{', '.join(map(repr, words))}}}, lambda: x]", typed)
    bound = functools.partial(objective, of={"these": [set(words), object()]})
    return [identity(nouns), identity(bound), identity(typed["typed"]), scheduled(warmed_up)]


def test_addresses_and_the_order_of_sets_which_no_two_processes_share_do_not_count(monkeypatch):
    before = identities(WORDS)
    monkeypatch.setitem(globals(), "NOUNS", set(reversed(WORDS)))
    monkeypatch.setitem(globals(), "RULES", [object(), lambda x: x])
    assert list(NOUNS) != list(set(WORDS))
    assert identities(WORDS[::-1]) == before
    fewer = identities(WORDS[1:])
    assert fewer[1] != before[1] and fewer[2] != before[2]


def test_settings_of_a_schedule_within_a_schedule_count():
    assert scheduled(warmed_up) == scheduled(warmed_up) != scheduled(lambda o: warmed_up(o, 6))


@pytest.mark.parametrize(
    ("make", "digest"),
    [
        (lambda o: lr_scheduler.CosineAnnealingLR(o, 10), "52f7774b3451"),
        (lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10), "4d2e95dde35e"),
        (lambda o: lr_scheduler.MultiStepLR(o, [5, 10]), "03b7424f52cb"),
    ],
    ids=["cosine", "one cycle", "steps"],
)
def test_earlier_checkpoints_have_the_same_identity(make, digest):
    assert scheduled(make)[2] == digest


def test_differences_name_both_values():
    assert differences({"seed": 1, "old": 2}, {"seed": 3}) == [
        "old None (the checkpoint: 2)",
        "seed 3 (the checkpoint: 1)",
    ]


WEIGHTS = torch.ones(3000)
ARRAY = np.zeros(4)


def weighted(x, by=WEIGHTS):
    return sum(part / TEMPERATURE for part in x), (lambda: ARRAY)()


def bound(factor):
    return lambda x: x * factor


def test_what_inner_functions_read_and_defaults_and_closures_count(monkeypatch):
    before = identity(weighted)
    assert identity(weighted) == before
    for name, value in (("TEMPERATURE", 3.0), ("ARRAY", np.eye(2))):
        with monkeypatch.context() as changed:
            changed.setitem(globals(), name, value)
            assert identity(weighted) != before, name
    other = WEIGHTS.clone()
    other[1500] = 1 + 1e-6  # which a tensor's repr does not show
    monkeypatch.setattr(weighted, "__defaults__", (other,))
    assert identity(weighted) != before
    assert identity(bound(1)) == identity(bound(1)) != identity(bound(2))


def test_of_a_partial_positional_arguments_and_tensors_count():
    ones = [identity(functools.partial(objective, argument)) for argument in (1, 1, 2, WEIGHTS, 2 * WEIGHTS)]
    assert ones[0] == ones[1]
    assert len(set(ones)) == 4
    shapes = [WEIGHTS, WEIGHTS.view(2, 1500), WEIGHTS.view(torch.int32)]  # of the same bytes
    assert len({identity(functools.partial(objective, argument)) for argument in shapes}) == 3
