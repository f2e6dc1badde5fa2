"""A report of files that somebody, or something, has altered: a page, or one line that says so."""

import json
import shutil

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlm.errors import UserError
from mlm.train import train
from tests.scripts import load_script

script = load_script("report")
FILES = ("run.json", "all_results.json", "comparison.json", "fill_mask.json", "metrics.jsonl")
DEEP = 100_000
values = st.one_of(
    st.sampled_from([None, True, 0, -1, 10**400, "", "\x1b[31m", [], [1], {}, {"a": None}, [[]], "deep"]),
    st.floats(),
    st.text(max_size=3),
)


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    train(toy.config(folder, max_train_steps=2))
    script.main([str(folder)])
    return folder


def places(value, path=()):
    """The way to each part of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def altered(value, path, instead):
    if not path:
        return instead
    copy = value.copy()
    copy[path[0]] = altered(value[path[0]], path[1:], instead)
    return copy


@pytest.mark.slow
@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example is small as it is
)
@given(st.data(), st.sampled_from(FILES))
def test_an_altered_value_anywhere_is_one_line_or_a_page(run, tmp_path, data, name):
    folder = tmp_path / "altered"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    text = (folder / name).read_text()
    value = [json.loads(line) for line in text.splitlines()] if name == "metrics.jsonl" else json.loads(text)
    path = data.draw(st.sampled_from(list(places(value))[name == "metrics.jsonl" :]))
    changed = altered(value, path, data.draw(values))
    lines = changed if name == "metrics.jsonl" else [changed]
    (folder / name).write_text(
        "".join(f"{json.dumps(line)}\n" for line in lines).replace('"deep"', "[" * DEEP + "]" * DEEP)
    )
    (folder / "report.html").unlink()
    try:
        script.main([str(folder)])
    except UserError as error:
        assert "\n" not in str(error)
        assert str(folder) in str(error)
        assert not (folder / "report.html").exists()
    else:
        assert (folder / "report.html").exists()
