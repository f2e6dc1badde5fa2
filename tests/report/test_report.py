"""The report: one page, the figures of all_results.json on it, readable in light, dark and on a phone."""

import dataclasses
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlm import cli
from mlm.data.corpus import OutOfDomainConfig
from mlm.errors import UserError
from mlm.figures import unspaced
from mlm.inference.fill_mask import fill, load
from mlm.report.charts import breakdown_chart, event_chart, loss_chart
from mlm.report.report import aligned, chance, duration, render, share, unlike
from mlm.report.run_directory import RunConfig
from mlm.report.run_record import read_runs
from mlm.train import train
from tests.conftest import REPOSITORY
from tests.scripts import load_script
from tests.tokenizers_for_tests import wordpiece

script, examples = load_script("report"), load_script("examples")
from_held_out, readable = examples.from_held_out, examples.readable

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
NASTY = '</script><img src=x onerror="window.broken=1"><b>&amp;'  # as a document, or a folder, may hold it


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory):
    """A run that measured out-of-domain text too, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    out_of_domain = folder.parent / "general.txt"
    out_of_domain.write_text("a young owl and a small fox like every old day .\n" * 20)
    modules = {
        "out_of_domain": OutOfDomainConfig(out_of_domain_file=str(out_of_domain)),
        "run": RunConfig(output_dir=str(folder), logging_steps=10),
    }
    train(toy.config(max_train_steps=60, eval_steps=20, modules=modules))
    script.main([str(folder)])
    return folder


@pytest.fixture(scope="module")
def other(toy, run):
    """The same experiment at another learning rate, whose model was not measured before its first step."""
    folder = run.parent / "other"
    modules = {"run": RunConfig(output_dir=str(folder), logging_steps=10)}
    train(toy.config(max_train_steps=60, learning_rate=1e-3, eval_on_start=False, modules=modules))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (BROWSER and DRIVER):
        pytest.skip("looks at the page in Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield Browser(driver)
    driver.quit()


class Browser:
    def __init__(self, driver) -> None:
        self.driver = driver

    def open(self, page, width=1200, scheme="light") -> None:
        """Opens a file and unfolds it all. Fails where the page complains, or asks for another file."""
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
        self.driver.get(page.as_uri())
        self.js("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert self.driver.get_log("browser") == []
        assert self.js("return performance.getEntriesByType('resource').map(entry => entry.name)") == []

    def js(self, code: str, *values):
        return self.driver.execute_script(code, *values)

    def all(self, selector: str, expression: str) -> list:
        """The value of a JavaScript expression for each element e that matches."""
        return self.js(f"return [...document.querySelectorAll({json.dumps(selector)})].map(e => {expression})")

    def figures(self) -> list[tuple[str, str, float | None, str]]:
        """Run, key of all_results.json, value and text of each figure on the page."""
        figures = self.all("data", "[e.dataset.run, e.dataset.key, e.value, e.textContent]")
        return [(run, key, json.loads(value) if value else None, text) for run, key, value, text in figures]


def number(text: str) -> float:
    value = float(text.replace(",", "").rstrip("%"))
    return value / 100 if text.endswith("%") else value


def test_the_figures_on_the_page_are_those_of_all_results_json(run, browser):
    browser.open(run / "report.html")
    results = json.loads((run / "all_results.json").read_text())
    shown = browser.figures()
    for name, key, value, text in shown:
        assert (name, value) == ("toy", results[key]), key
        assert number(text) == pytest.approx(value, rel=2e-3, abs=6e-4), key
    keys = {key for _, key, _, _ in shown}
    measured = {"perplexity", "eval_loss", "accuracy", "bits_per_character", "bits_per_word"}
    assert keys >= measured | {f"{name}_before" for name in measured}
    assert keys >= {"gain", "gain_low", "gain_high", "tokens_per_second", "peak_memory_mib", "steps"}
    out_of_domain = {"perplexity", "eval_loss", "accuracy", "bits_per_character"}
    assert keys >= {f"out_of_domain_{name}{when}" for name in out_of_domain for when in ("", "_before")}
    assert keys >= {
        "out_of_domain_gain",
        "out_of_domain_gain_low",
        "out_of_domain_gain_high",
        "out_of_domain_eval_masked_tokens",
    }


def test_the_charts_hold_the_measurements_of_the_run(run, browser):
    browser.open(run / "report.html")
    charts = browser.all(".chart", "e.data.map(t => [t.name, t.x, t.y])")
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained, evaluated = ([e for e in events if e["event"] == kind] for kind in ("train", "eval"))
    (training, held_out), [(_, tokens, rates)] = charts[:2]
    assert training[1:] == [[e["tokens"] for e in trained], [e["loss"] for e in trained]]
    assert held_out[1:] == [[e["tokens"] for e in evaluated], [e["eval_loss"] for e in evaluated]]
    assert held_out[1][0] == 0
    assert rates == [e["learning_rate"] for e in trained]
    assert tokens == training[1]
    compared = json.loads((run / "comparison.json").read_text())["held_out"]
    before, after = charts[2]
    rows = [row for row in compared["breakdowns"]["frequency"] if row["count"]]
    assert before[2] == [row["nats_before"] / row["count"] for row in rows]
    assert after[2] == [row["nats_after"] / row["count"] for row in rows]
    assert all(browser.all(".chart", "e.querySelector('svg .trace, svg .point') !== null"))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two CSS colours rgb(…)."""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_in_light_and_dark(run, browser, scheme):
    browser.open(run / "report.html", scheme=scheme)
    page = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert (contrast(page, "rgb(255, 255, 255)") < 1.5) == (scheme == "light")
    texts = browser.all("h1, h2, h3, p, td, th, caption, summary, .number, data", "getComputedStyle(e).color")
    assert all(contrast(colour, page) >= 4.5 for colour in set(texts))
    inks = browser.all(".chart text", "getComputedStyle(e).fill")
    curves = browser.all(".chart path.js-line", "getComputedStyle(e).stroke")
    assert inks
    assert curves
    assert all(contrast(colour, page) >= 4.5 for colour in {*inks, *curves})


def test_the_charts_follow_a_change_between_light_and_dark(run, browser):
    browser.open(run / "report.html", scheme="light")
    ink = "return getComputedStyle(document.querySelector('.chart text')).fill"
    light = browser.js(ink)
    wish = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)
    browser.js("return new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
    assert browser.js(ink) != light


def test_a_phone_scrolls_tables_and_not_the_page(run, other, browser, tmp_path):
    script.main([str(run), str(other), "--output", str(tmp_path / "both.html")])
    for page in (run / "report.html", tmp_path / "both.html"):
        browser.open(page, width=390)
        assert browser.js("return document.documentElement.scrollWidth") <= 390
        right = browser.all("main > *, section > *, .chart, .scroll, p, h2", "e.getBoundingClientRect().right")
        assert max(right) <= 390
        drawn = "e.querySelector('.trace .point path, .trace .js-line').getBoundingClientRect().width > 0"
        assert all(browser.all(".chart", drawn))


def test_headings_and_tables_are_what_a_screen_reader_needs(run, browser):
    browser.open(run / "report.html")
    assert browser.js("return document.documentElement.lang") == "en"
    levels = browser.all("h1, h2, h3", "Number(e.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert all(browser.all("tbody tr", "(e.querySelector('th[scope=row]') ?? e.closest('.example')) !== null"))
    assert all(browser.all("th", "e.scope"))
    assert all(browser.all(".chart", "e.getAttribute('aria-label')"))


def test_text_of_a_run_stays_text(run, browser, tmp_path):
    folder = tmp_path / NASTY.replace("/", "⁄")
    shutil.copytree(run, folder)
    for name in ("comparison.json", "run.json", "fill_mask.json"):
        path = folder / name
        stored = json.loads(path.read_text())
        if name == "comparison.json":
            for row in (*stored["held_out"]["words"]["gained"], *stored["held_out"]["breakdowns"]["position"]):
                row["text" if "text" in row else "name"] = NASTY
            stored["held_out"]["text"] = NASTY
        elif name == "run.json":
            stored["configuration"]["corpus"]["train_file"] = NASTY
        else:
            filler = {"token": NASTY, "probability": 0.5}
            stored["sentences"] = [
                {"text": f"{NASTY} [MASK]", "truth": NASTY, "before": [[filler]], "after": [[filler]]}
            ]
        path.write_text(json.dumps(stored))
    script.main([str(folder)])
    browser.open(folder / "report.html")
    assert browser.js("return [window.broken ?? null, document.images.length]") == [None, 0]
    assert NASTY in browser.all("#words th[scope=row]", "e.textContent")
    assert NASTY in browser.js("return document.querySelector('#examples').textContent")
    assert browser.js("return document.querySelector('h1').textContent") == folder.name


def test_several_runs_stand_side_by_side(run, other, browser, tmp_path):
    page = tmp_path / "both.html"
    assert script.main([str(run), str(other), "--output", str(page)]) == {"report": str(page)}
    browser.open(page)
    results = {folder.name: json.loads((folder / "all_results.json").read_text()) for folder in (run, other)}
    shown = browser.figures()
    assert {name for name, _, _, _ in shown} == {"toy", "other"}
    assert all(value == results[name].get(key) for name, key, value, _ in shown)
    curves = browser.js("return document.querySelector('.chart').data.map(t => t.name)")
    assert curves == ["toy, training", "toy, held out", "other, training", "other, held out"]
    [table, *_] = browser.js("return document.querySelectorAll('#settings table')")
    rows = [row.text.split() for row in table.find_elements("css selector", "tbody tr")]
    differing = {name: values for name, *values in rows}
    assert differing["optimizer.learning_rate"] == ["0.005", "0.001"]
    assert "optimizer.weight_decay" not in differing


def text_of(page: str, of: str = "main") -> str:
    """What a person reads of a page, or of a part of it, blanks run together."""
    [part] = re.findall(rf"<{of}[ >].*?</{of.split()[0]}>", page, re.DOTALL)[:1]
    part = re.sub(r"<script.*?</script>", "", part, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", part)).split())


def with_experiment(record, **settings):
    return dataclasses.replace(record, about=record.about | {"experiment": settings})


def with_about(record, **sections):
    return dataclasses.replace(record, about=record.about | sections)


def test_the_page_begins_with_what_a_run_is(run):
    sizes = {"train": {"documents": 400, "tokens": 4000}, "held_out": {"documents": 1, "tokens": 600}}
    command = ["scripts/train.py", "--train_file", "a b.txt", "--learning_rate", "5e-3"]
    [record] = read_runs([run])
    record = dataclasses.replace(record, seconds=133.4)
    described = with_about(record, data=sizes, started="2026-01-31T18:20:33+01:00", command=command)
    heading = text_of(render([described]), "header")
    assert heading.startswith("toy Model checkpoint Training data")
    for fact in (
        "train.txt: 400 documents, 4,000 tokens",
        "validation.txt: 1 document, 600 tokens",
        "Learning rate 0.005, linear",
        "Batch 8 chunks of 16 tokens",
        "Steps 60",
        "Epochs 1.920",
        "Duration 0:02:13",
        "Started 2026-01-31 18:20",
        "Command scripts/train.py --train_file 'a b.txt' --learning_rate 5e-3",
    ):
        assert fact in heading
        assert heading.index(fact) < heading.index("perplexity, held out")
    assert "commit" not in heading


def test_what_an_older_run_does_not_say_is_a_dash(run):
    [record] = read_runs([run])
    about = {k: v for k, v in record.about.items() if k not in ("data", "started", "command")}
    configuration = {k: v for k, v in record.about["configuration"].items() if k in ("model", "corpus")}
    older = dataclasses.replace(record, about=about | {"configuration": configuration}, seconds=None)
    heading = text_of(render([older]), "header")
    for fact in ("train.txt: –", "validation.txt: –", "Learning rate –", "Duration –", "Started –", "Command –"):
        assert fact in heading


def test_what_runs_share_stands_once(run, tmp_path):
    """Three runs of one model on one text, one of them at another learning rate."""
    about = json.loads((run / "run.json").read_text()) | {"command": ["train.py"]}
    for name in ("a", "b", "c"):
        shutil.copytree(run, tmp_path / name)
        if name == "c":
            about["configuration"]["optimizer"]["learning_rate"] = about["experiment"]["learning_rate"] = 0.001
        (tmp_path / name / "run.json").write_text(json.dumps(about))
    page = render(read_runs([tmp_path / "a", tmp_path / "b", tmp_path / "c"]))
    heading = text_of(page, "header")
    assert heading.count("checkpoint") == 1
    assert "Learning rate 0.005, linear 0.005, linear 0.001, linear" in heading
    sentences = len(json.loads((run / "fill_mask.json").read_text())["sentences"])
    for section, texts, times in (
        ("held-out", ("mask seed", "left out one by one", "The interval lies above 1"), 1),
        ("settings", ("1 process on", "optimizer.learning_rate", "optimizer.weight_decay", "run.logging_steps"), 1),
        ("examples", ("before",), sentences),
    ):
        shown = text_of(page, f'section id="{section}"')
        assert {text: shown.count(text) for text in texts} == dict.fromkeys(texts, times)
    [row] = re.findall(r'<tr><th scope="row">Perplexity</th>.*?</tr>', page, re.DOTALL)[:1]
    assert row.count("<td>") == 4  # before, and after of each
    [row] = re.findall(r'<tr><th scope="row">Masked tokens</th>.*?</tr>', page, re.DOTALL)[:1]
    assert row.count("<data") == 1


def test_zeros_of_what_no_run_did_are_left_out(run):
    [record] = read_runs([run])
    for skipped, shown in ((0, False), (3, True)):
        results = record.results | {"skipped_steps": skipped, "checkpoint_seconds": 0.5 * skipped}
        training = text_of(render([dataclasses.replace(record, results=results)]), 'section id="training"')
        assert ("scaler skipped" in training) == shown
        assert ("blocked by checkpoints" in training) == shown
    results = record.results | {"accuracy_before": 0.0, "accuracy": 0.0}
    page = text_of(render([dataclasses.replace(record, results=results)]))
    assert re.search(r"Accuracy\s*0\.0%\s*0\.0%", page), "a figure of a measurement"


def test_bars_of_gained_and_lost_words_share_one_scale(run):
    [record] = read_runs([run])
    row = {"text": "a", "count": 1, "nats_before": 40.0, "nats_after": 0.0}
    comparison = json.loads(json.dumps(record.comparison))
    lists = {"gained": [row], "lost": [row | {"nats_before": 0.0, "nats_after": 10.0}]}
    comparison["held_out"] |= {"words": lists, "tokens": {"gained": [], "lost": []}}
    page = render([dataclasses.replace(record, comparison=comparison)]).split('id="words"')[1]
    assert re.findall(r'<span style="width:([\d.]+)%"></span>([\d.]+)', page)[:2] == [
        ("50.0", "40.0"),
        ("12.5", "10.0"),
    ]


def test_three_runs_on_a_phone_scroll_visibly(run, other, browser, tmp_path):
    """A table that goes on says so and fades at its edge, until it has been scrolled to its end."""
    shutil.copytree(run, tmp_path / "third")
    script.main([str(run), str(other), str(tmp_path / "third"), "--output", str(tmp_path / "three.html")])
    browser.open(tmp_path / "three.html", width=390)
    look = "return new Promise(done => requestAnimationFrame(() => setTimeout(done, 300)))"
    state = (
        "[e.scrollWidth > e.clientWidth + 1, getComputedStyle(e, '::before').content.includes('scroll'), "
        "getComputedStyle(e).maskImage !== 'none']"
    )
    browser.js(look)
    before = browser.all(".scroll", state)
    assert all(wide == says == fades for wide, says, fades in before)
    assert sum(wide for wide, _, _ in before) >= 3
    assert browser.all("#held-out .scroll", state) == [[True, True, True]]
    browser.js("document.querySelectorAll('.scroll').forEach(e => e.scrollLeft = 9999)")
    browser.js(look)
    assert browser.all(".scroll", state) == [[wide, says, False] for wide, says, _ in before]
    label = "e.querySelector('tbody th').getBoundingClientRect().left - e.getBoundingClientRect().left"
    assert browser.all("#held-out .scroll", label) == [0], "the label stays where it can be read"


def test_the_training_loss_is_not_called_what_it_may_not_be(run):
    [record] = read_runs([run])
    [training, _] = loss_chart([record]).data
    assert training.name == "training (in training mode, under training masks)"
    assert loss_chart([record]).layout.yaxis.title.text == "loss"
    shown = text_of(render([record]), 'section id="training"')
    assert "Their levels do not compare" in shown
    assert "Training loss, in training mode, under training masks" in shown
    assert "perplexity" not in shown


def test_named_scalars_of_the_objective_have_a_chart_each(run):
    [record] = read_runs([run])
    train = [e | {"distance<b>": i, "note": "text", "on": True} for i, e in enumerate(record.train)]
    page = render([dataclasses.replace(record, train=train)])
    titles = re.findall(r"<h3>(.*?)</h3>", page.split('id="training"')[1].split("</section>")[0])
    assert titles == ["Loss", "Learning rate", "distance&lt;b&gt;", "Throughput and memory"]
    chart = event_chart([dataclasses.replace(record, train=train), record], "distance<b>")
    assert [list(curve.y) for curve in chart.data] == [list(range(len(train)))]
    assert chart.layout.yaxis.title.text == "distance&lt;b&gt;"


def test_a_gain_from_a_handful_of_tokens_says_so_beside_it(run):
    [record] = read_runs([run])
    comparison = json.loads(json.dumps(record.comparison))
    concentration = {"types": ["<br", "/>"], "share": 0.65, "gain_without": 1.23}
    comparison["held_out"]["concentration"] = concentration
    few = dataclasses.replace(record, comparison=comparison)
    sentence = "65.0% of the gain comes from 2 token types (<br, />); without them the gain is 1.230×."
    assert sentence in text_of(render([few]), "header")
    assert text_of(render([few, record])).count(sentence) == 1
    concentration |= {"share": 1.2, "types": ["br"], "gain_without_interval": [0.9, 1.5]}
    sentence = "All of the gain and more comes from 1 token type (br); without it the gain is 1.230×"
    assert f"{sentence} (0.9000 to 1.500)." in text_of(render([few]), "header")
    comparison["held_out"]["concentration"] = None
    assert "token type" not in text_of(render([few]), "header")


def test_scripts_without_spaces_are_not_spaced_apart(run):
    for decoded, text in (
        ("酒 店 很 好 ， 有 3 个 [MASK] 子 。 a good film", "酒店很好，有 3 个[MASK]子。 a good film"),
        ("この [MASK] は 大 き い", "この[MASK]は大きい"),
        ("한 국 어 and [MASK] too", "한 국 어 and [MASK] too"),
    ):
        assert unspaced(decoded) == text
    tokenizer = wordpiece(["酒 店 很 好 ，", "film"])
    assert readable("酒 店 [MASK] 好 ， film", tokenizer) == "酒店[MASK]好， film"
    [record] = read_runs([run])
    comparison = json.loads(json.dumps(record.comparison))
    comparison["held_out"]["words"]["gained"][0]["text"] = "酒 店"
    page = render([dataclasses.replace(record, comparison=comparison)])
    assert '<th scope="row">酒店</th>' in page


def test_durations_are_written_as_in_the_log():
    seconds = (None, 8.44, 133.4, 3599.7, 90061)
    assert [duration(s) for s in seconds] == ["–", "0:00:08", "0:02:13", "1:00:00", "1 day, 1:01:01"]


def test_a_run_lasts_as_long_as_its_training_where_it_was_resumed(run, tmp_path):
    """The clock of metrics.jsonl starts anew with each process, train_seconds goes on."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    assert read_runs([run])[0].seconds == last
    shutil.copytree(run, tmp_path / "run")
    results = json.loads((run / "all_results.json").read_text()) | {"train_seconds": last + 100}
    (tmp_path / "run" / "all_results.json").write_text(json.dumps(results))
    assert read_runs([tmp_path / "run"])[0].seconds == last + 100


def test_a_run_has_one_colour_wherever_it_is(run, other, tmp_path):
    """The first one was not measured at the start: it is in no comparison, and has its colour still."""
    shutil.copytree(run, tmp_path / "again")
    runs = read_runs([other, run, tmp_path / "again"])
    compared = [(r, r.comparison["held_out"]) for r in runs[1:]]
    curves = [trace.line.color for trace in loss_chart(runs).data]
    assert curves == [f"var(--series-{i})" for i in (0, 0, 1, 1, 2, 2)]
    bars = breakdown_chart(compared, "word", "").data
    assert [trace.marker.color for trace in bars] == ["var(--series-1)", "var(--series-2)"]
    keys = re.findall(r'<span class="key key-(\d)"></span>(other|toy|again)', render(runs))
    assert len(keys) > 6
    assert {name: {key for key, of in keys if of == name} for _, name in keys} == {
        "other": {"0"},
        "toy": {"1"},
        "again": {"2"},
    }


def test_one_measured_run_among_several_shows_its_gain(run, other):
    assert "toy: gain" in text_of(render(read_runs([other, run])))


def test_runs_that_do_not_compare_are_said_not_to(run, other):
    runs = read_runs([run, other])
    assert unlike(runs, "held_out") == ""
    assert 'class="unlike"' not in render(runs)
    same = {"held_out corpus": "a", "tokenizer": "b", "max_seq_length": 16}
    for different, words in (
        ({"held_out corpus": "z"}, "texts; compare before and after within a run"),
        ({"tokenizer": "z"}, "tokenizers; compare bits per character"),
        ({"max_seq_length": 32, "eval_mask_seed": 1}, "chunk lengths; a small difference between runs may come from"),
    ):
        pair = [with_experiment(runs[0], **same), with_experiment(runs[1], **same | different)]
        reason = unlike(pair, "held_out")
        assert reason.startswith(f"These runs were measured on different {words}")
        assert reason.endswith(".")
        page = text_of(render(pair))
        assert page.index(reason) < page.index("Of each run the same masks before and after")
    folds = [
        with_experiment(r, eval_mask_folds=k, eval_mask_seeds=k or 1) for r, k in zip(runs, (None, 7), strict=True)
    ]
    assert "different numbers of mask seeds and mask folds;" in unlike(folds, "held_out")


def test_out_of_domain_texts_that_differ_are_named_where_they_are_compared(run):
    runs = read_runs([run])
    pair = [with_experiment(runs[0], **{"out_of_domain corpus": text}) for text in "ab"]
    page = render(pair)
    assert "different texts" in page.split('id="out-of-domain"')[1]
    assert "different texts" not in page.split('id="out-of-domain"')[0]


def test_curves_of_one_mask_round_beside_figures_of_several_say_so(run):
    [record] = read_runs([run])
    assert "first mask round alone" not in render([record])
    for settings in ({"eval_mask_folds": 7}, {"eval_mask_seeds": 3}):
        assert "first mask round alone" in text_of(
            render([with_experiment(record, **settings)]), 'section id="training"'
        )


def test_the_out_of_domain_text_is_described_as_the_held_out_one_is(run):
    page = render(read_runs([run]))
    for section in ("held-out", "out-of-domain"):
        shown = text_of(page, f'section id="{section}"')
        assert re.search(r"[\d,]+ masked tokens of [\d,]+ documents of .*, mask seed 0\.", shown)
        assert re.search(r"The interval is Student's, over [\d,]+ documents left out one by one\.", shown)


def test_the_gain_on_documents_one_by_one_is_beside_the_other(run):
    [record] = read_runs([run])
    comparison = json.loads(json.dumps(record.comparison))
    whole = comparison["held_out"]["one_by_one"]
    changed = dataclasses.replace(record, comparison=comparison)
    whole |= {"documents": 60, "gain": {"value": 1.25, "interval": [1.125, 1.5]}}
    sentence = "On 60 documents one by one, each from its start, the gain is 1.250× (1.125 to 1.500)"
    assert f"{sentence}." in text_of(render([changed]), "header")
    assert text_of(render([changed, record])).count(sentence) == 1
    whole["differs"] = True
    assert f"{sentence}, another story: " in text_of(render([changed]), "header")
    del comparison["held_out"]["one_by_one"]  # a run of an older version
    assert "one by one, each" not in text_of(render([changed]), "header")


@pytest.mark.parametrize(
    ("units", "why"), [(4, "4 chunks are too few"), (1, "there is one chunk only"), (0, "nothing was masked")]
)
def test_no_interval_is_said_to_be_none(run, units, why):
    [record] = read_runs([run])
    comparison = json.loads(json.dumps(record.comparison))
    for compared in comparison.values():
        compared["gain"]["interval"] = [None, None]
        compared["bootstrap"] |= {"unit": "chunks", "units": units}
        compared["masks"] |= {"documents": 1, "masked_tokens": units}
    gone = [f"{prefix}gain_{end}" for prefix in ("", "out_of_domain_") for end in ("low", "high")]
    results = record.results | dict.fromkeys(gone)
    page = render([dataclasses.replace(record, results=results, comparison=comparison)])
    shown = text_of(page)
    assert re.search(r"95% interval\s*none", text_of(page, "header"))
    assert shown.count(f"No interval can be given: {why}.") == 4
    assert ("1 masked token of 1 document of" in shown) == (units == 1)
    for wrong in ("–––", "bootstrap over", "left out one", "1 documents", "1 chunks", "–×", "– to –"):
        assert wrong not in shown


def test_an_interval_over_chunks_is_said_to_be_of_one_document_and_is_not_set_against_chance(run):
    [record] = read_runs([run])
    comparison = json.loads(json.dumps(record.comparison))
    for compared in comparison.values():
        compared["gain"]["interval"] = [1.5, 2.5]
        compared["bootstrap"] |= {"unit": "chunks", "units": 5}
    page = render([dataclasses.replace(record, comparison=comparison)])
    shown = text_of(page)
    assert "95% interval over chunks of one document" in text_of(page, "header")
    assert "over 5 chunks of one document left out one by one" in shown
    assert "over chunks of one document and says nothing of other documents" in shown
    assert "more than the chance" not in shown


def test_a_figure_that_one_run_lacks_is_a_dash_before_and_after(run, other):
    spread = {"perplexity_spread": 0.5, "perplexity_spread_before": 0.25}
    first, second = read_runs([run, other])
    page = render([dataclasses.replace(first, results=first.results | spread), second])
    [row] = re.findall(r"<tr><th scope=\"row\">Spread.*?</tr>", page, re.DOTALL)
    cells = [text_of(cell, "td") for cell in re.findall(r"<td>.*?</td>", row, re.DOTALL)]
    assert cells == ["0.2500", "0.5000", "–", "–"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("run.json", "{}", r"run\.json is damaged, or of another version or program: it lacks config"),
        ("run.json", "[1]", r"run\.json cannot be read: it holds no JSON object"),
        ("run.json", '{"configuration": {}, "experiment": {}, "environment": {}}', r"run\.json is damaged"),
        ("run.json", '{"configuration": {}, "experiment": [], "environment": {}}', r"run\.json is damaged"),
        ("comparison.json", '{"held_out": {"gain": 1}}', r"files of a run that are altered, or of another version"),
        ("all_results.json", "3", "it holds no JSON object"),
    ],
)
def test_a_foreign_or_damaged_file_is_one_clear_line(run, tmp_path, name, text, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        script.main([str(tmp_path / "run"), "--output", str(tmp_path / "page.html")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


def test_lines_of_metrics_that_are_no_events_are_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n3\nnull\n{}\n{"event": []}\n{"event": "train"}\n{"event": "eval", "loss": 1}\n\xff\n')
    [read], [whole] = read_runs([tmp_path / "run"]), read_runs([run])
    assert (read.train, read.evaluations) == (whole.train, whole.evaluations)
    assert read.train
    assert read.evaluations
    render([read])


def test_runs_of_one_name_are_told_apart_by_their_folders(run, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(run, tmp_path / place / "toy")
    assert [r.name for r in read_runs([tmp_path / "a" / "toy", tmp_path / "b" / "toy"])] == ["a/toy", "b/toy"]
    with pytest.raises(UserError, match="twice"):
        read_runs([run, run.parent / "." / run.name])


def test_a_run_that_compared_nothing_has_a_report_all_the_same(other, browser):
    script.main([str(other)])
    browser.open(other / "report.html")
    assert not (other / "comparison.json").exists()
    perplexity = json.loads((other / "all_results.json").read_text())["perplexity"]
    assert ("other", "perplexity", perplexity, aligned(perplexity)) in browser.figures()
    assert "nothing to compare" in browser.js("return document.querySelector('header').textContent")


def test_a_run_that_has_not_ended_shows_its_curves(run, browser, tmp_path):
    folder = tmp_path / "running"
    folder.mkdir()
    shutil.copy(run / "run.json", folder)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:4]) + '\n{"event": "tr')  # being written
    script.main([str(folder)])
    browser.open(folder / "report.html")
    assert "has not ended" in browser.js("return document.querySelector('header').textContent")
    assert browser.figures() == []


@pytest.mark.parametrize("missing", ["value", "interval"])
def test_figures_that_do_not_exist_are_left_open(run, missing):
    """Nothing was masked, a loss is infinite, one document: JSON has null there."""
    [record] = read_runs([run])
    results = {
        **record.results,
        **dict.fromkeys(
            ("gain_low", "gain_high")
            if missing == "interval"
            else ("gain", "gain_low", "gain_high", "perplexity", "eval_loss", "bits_per_word")
        ),
    }
    comparison = json.loads(json.dumps(record.comparison))
    comparison["held_out"]["gain"]["interval"] = [None, None]
    if missing == "value":
        comparison["held_out"]["gain"]["value"] = None
        for rows in (*comparison["held_out"]["breakdowns"].values(), *comparison["held_out"]["words"].values()):
            for row in rows:
                row["nats_after"] = None
    page = render([dataclasses.replace(record, results=results, comparison=comparison)] * 2)
    assert "No interval can be given" in page
    assert "NaN" not in page.split("<script>")[0]
    assert ">None<" not in page


def test_folders_that_hold_no_run_are_refused_before_anything_is_written(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no run\.json"):
        script.main([str(run), str(tmp_path / "empty"), "--output", str(tmp_path / "page.html")])
    shutil.copytree(run, tmp_path / "damaged")
    (tmp_path / "damaged" / "comparison.json").write_text("{")
    with pytest.raises(UserError, match=r"comparison\.json cannot be read"):
        script.main([str(tmp_path / "damaged"), "--output", str(tmp_path / "page.html")])
    with pytest.raises(UserError, match="cannot be written"):
        script.main([str(run), "--output", str(tmp_path / "nowhere" / "page.html")])
    assert not (tmp_path / "page.html").exists()


def test_examples_are_held_out_sentences_as_base_and_adapted_model_fill_them(toy, run):
    examples = json.loads((run / "fill_mask.json").read_text())["sentences"]
    assert examples
    gained = json.loads((run / "comparison.json").read_text())["held_out"]["words"]["gained"]
    held_out = toy.validation_file.read_text().replace(" .", ".").splitlines()  # as the tokenizer decodes it
    for example in examples:
        assert example["truth"] in {row["text"] for row in gained}
        assert example["text"].replace("[MASK]", example["truth"]) in held_out
    for when, checkpoint in (("before", toy.checkpoint), ("after", run)):
        fillers = fill(*load(str(checkpoint)), [example["text"] for example in examples], 5)
        expected = [[[f._asdict() for f in ranked] for ranked in masks] for masks in fillers]
        assert [example[when] for example in examples] == expected
    _, tokenizer = load(str(run))
    drawn = [(example["text"], example["truth"]) for example in examples]
    [record] = read_runs([run])
    assert from_held_out(record, tokenizer) == drawn
    assert from_held_out(record, tokenizer, seed=1) != drawn


def test_given_sentences_take_the_place_of_held_out_ones_and_are_not_kept(run, tmp_path):
    kept = (run / "fill_mask.json").read_bytes()
    (tmp_path / "sentences.txt").write_text("the old [MASK] likes milk every [MASK] .\n\n")
    page = tmp_path / "page.html"
    script.main([str(run), "--sentences_file", str(tmp_path / "sentences.txt"), "--output", str(page)])
    examples = page.read_text().split('id="examples"')[1].split("</section>")[0]
    assert examples.count('<div class="example">') == 1
    assert examples.count("<table>") == 2  # one for each mask
    assert (run / "fill_mask.json").read_bytes() == kept


def test_a_base_that_is_gone_costs_the_examples_and_no_more(run, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(run, folder)
    (folder / "fill_mask.json").unlink()
    move_base(folder, tmp_path / "gone")
    script.main([str(folder)])
    assert "no examples of filled masks, as no such folder" in capsys.readouterr().out
    assert 'id="examples"' not in (folder / "report.html").read_text()


def move_base(folder, gone) -> None:
    about = json.loads((folder / "run.json").read_text())
    about["configuration"]["model"]["model_name_or_path"] = str(gone)
    (folder / "run.json").write_text(json.dumps(about))


def test_a_base_that_is_gone_costs_the_fillers_of_given_sentences_and_no_more(run, tmp_path, capsys):
    folder, page, given = tmp_path / "moved", tmp_path / "page.html", tmp_path / "sentences.txt"
    shutil.copytree(run, folder)
    move_base(folder, tmp_path / "gone")
    given.write_text("the zebra [MASK] .\n")
    script.main([str(folder), "--sentences_file", str(given), "--output", str(page)])
    printed = capsys.readouterr().out.splitlines()
    assert "no examples of filled masks, as no such folder" in printed[0]
    assert printed[1:] == [f"report: {page}"]
    assert "zebra" not in page.read_text()


def test_the_page_of_several_runs_is_written_beside_the_first_and_it_is_said_where(run, tmp_path, capsys):
    for name in ("one", "two"):
        shutil.copytree(run, tmp_path / name)
    script.main([str(tmp_path / "one"), str(tmp_path / "two")])
    assert f"report of 2 runs: {tmp_path / 'report.html'}" in capsys.readouterr().out.splitlines()
    assert (tmp_path / "report.html").exists()


def test_a_given_sentence_without_a_mask_is_still_a_mistake(run, tmp_path):
    (tmp_path / "sentences.txt").write_text("no mask here .\n")
    with pytest.raises(UserError, match="has no mask"):
        script.main(
            [str(run), "--sentences_file", str(tmp_path / "sentences.txt"), "--output", str(tmp_path / "p.html")]
        )
    assert not (tmp_path / "p.html").exists()


@pytest.mark.parametrize("damage", ["a flag", "no seed", "documents"])
def test_a_run_of_another_version_has_a_report_without_examples(run, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "fill_mask.json").unlink()
    about = json.loads((folder / "run.json").read_text())
    if damage == "a flag":
        about["configuration"]["model"]["from_the_future"] = 1
    elif damage == "no seed":
        del about["configuration"]["train"]
    else:
        (folder / "documents.parquet").write_bytes(b"PAR")
    (folder / "run.json").write_text(json.dumps(about))
    script.main([str(folder)])
    printed = capsys.readouterr().out.splitlines()
    assert "no examples of filled masks, as" in printed[0]
    assert len(printed) == 2
    assert 'id="examples"' not in (folder / "report.html").read_text()


def test_examples_of_other_results_are_made_anew_and_never_shown(run, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(run, folder)
    whole = json.loads((folder / "fill_mask.json").read_text())
    stale = json.loads(json.dumps(whole))
    for example in stale["sentences"]:
        example["text"] = "the zebra [MASK]"
    (folder / "fill_mask.json").write_text(json.dumps(stale))
    script.main([str(folder)])
    assert json.loads((folder / "fill_mask.json").read_text()) == stale, "of these results: kept"
    results = json.loads((folder / "all_results.json").read_text())
    (folder / "all_results.json").write_text(json.dumps(results | {"train_seconds": 1.0}))
    assert read_runs([folder])[0].examples is None
    script.main([str(folder)])
    assert json.loads((folder / "fill_mask.json").read_text())["sentences"] == whole["sentences"]
    assert "zebra" not in (folder / "report.html").read_text()


def test_masked_words_are_words(run, tmp_path):
    """No "br" of a tag, no "i"; in a script without capitals one character is a word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run)
    words = ["milk", "br", "i", "3rd", "cat", "好"]
    tokenizer.add_tokens(words)
    stored = json.loads((run / "comparison.json").read_text())
    [row, *_] = stored["held_out"]["words"]["gained"]
    stored["held_out"]["words"]["gained"] = [row | {"text": word} for word in words]
    openings = [f"a b {word} c {i}" for i, word in enumerate(words)]
    table = pa.table({"text": ["held_out"] * len(words), "opening": openings})
    pq.write_table(table, tmp_path / "documents.parquet")
    record = dataclasses.replace(read_runs([run])[0], folder=tmp_path, comparison=stored)
    assert {word for _, word in from_held_out(record, tokenizer)} == {"milk", "cat", "好"}


def test_examples_are_spaced_as_people_do_where_the_tokens_stay_the_same():
    words = ["it", "'", "s", "a", "film", ",", "i", "think", "(", ")", ".", "the", "good", "good.", "[MASK]"]
    tokenizer = wordpiece(words)
    for decoded, text in (
        ("it ' s a [MASK] , i think ( a film ) .", "it's a [MASK], i think (a film)."),
        ("[MASK] ' s film .", "[MASK]'s film."),
        ("the ' good ' film", "the ' good ' film"),  # a quotation
    ):
        assert readable(decoded, tokenizer) == text


@pytest.mark.parametrize("which", ["adapted", "base"])
def test_a_report_runs_no_code_that_a_run_brings_along(run, tmp_path, capsys, which):
    """A run.json that says to trust it is not the reader's word."""
    folder, base = tmp_path / "adapted", tmp_path / "base"
    for copy in (folder, base):
        shutil.copytree(run, copy)
    (folder / "fill_mask.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForMaskedLM": "own.M"}}
    (tmp_path / which / "config.json").write_text(json.dumps(config))
    (tmp_path / which / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    about = json.loads((folder / "run.json").read_text())
    about["configuration"]["model"] |= {"trust_remote_code": True, "model_name_or_path": str(base)}
    (folder / "run.json").write_text(json.dumps(about))
    script.main([str(folder)])
    assert "no examples" in capsys.readouterr().out
    assert not (tmp_path / "ran").exists()


@given(st.floats(-1e12, 1e12))
def test_figures_are_rounded_to_four_digits(value):
    assert number(aligned(value)) == pytest.approx(value, rel=5.1e-4)


def test_figures_align_and_small_shares_are_not_nothing():
    assert [aligned(v) for v in (92, 52.68123, 1.7462, 0.5, 1234.5, None)] == [
        "92.00",
        "52.68",
        "1.746",
        "0.5000",
        "1,234",
        "–",
    ]
    assert [share(v) for v in (0.5, 0.00034, 1e-9, 0.0, None)] == ["50.0%", "0.03%", "0.001%", "0.0%", "–"]


def test_the_page_says_what_a_chance_is(run):
    shown = text_of(render(read_runs([run])), 'section id="words"')
    assert "of a word in pieces, the product over those of its pieces that were masked" in shown
    assert "probability of the right word" not in shown


def test_the_chance_of_a_word_is_the_geometric_mean_over_its_occurrences():
    row = {"count": 2, "nats_before": -math.log(0.9) - math.log(0.1), "nats_after": None}
    assert chance(row, "before") == "30.0%"
    assert chance(row, "after") == "0.0%"


def test_the_page_is_made_from_the_directory_alone_without_torch(run, tmp_path):
    program = (
        "import sys; from pathlib import Path\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from mlm.report.report import write_report\nfrom mlm.report.run_record import read_runs\n"
        "write_report(read_runs([Path(sys.argv[1])]), Path(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(run), str(tmp_path / "page.html")]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    assert (tmp_path / "page.html").read_text() == (run / "report.html").read_text()


def test_the_script_says_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        cli.parse([script.ReportConfig], ["--help"], cli.command(script.__doc__))
    assert "--sentences_file" in capsys.readouterr().out


def test_no_text_ends_the_script_that_holds_a_chart():
    spec = go.Figure(layout={"title": {"text": NASTY}}).to_json()
    assert "<" not in spec
    assert json.loads(spec)["layout"]["title"]["text"] == NASTY


def probed(run, folder):
    """A copy of the run, with a probe of a task of a nasty name."""
    shutil.copytree(run, folder)
    comparison = json.loads((folder / "comparison.json").read_text())
    figures = {"before": 0.614, "after": 0.652, "difference": 0.038, "interval": [-0.004, 0.0801]}
    rows = [
        {"k": k, "labels": 2 * k, "classifier": classifier, "accuracy": figures, "macro_f1": figures}
        for k in (16, 64, 300)
        for classifier in ("logistic regression", "nearest neighbours")
    ]
    about = {"text": NASTY, "documents": 1000, "classes": 2, "in_training_text": 10, "splits": 20}
    about |= {"rows": 4000, "rows_taken": 1000, "rows_in_training_text": list(range(0, 100, 10))}
    nothing = {"before": 0.614, "after": 0.614, "difference": 0.0, "interval": [0.0, 0.0]}
    rows[-1] = {**rows[-1], "accuracy": nothing}
    comparison["task"] = about | {"curve": rows}
    (folder / "comparison.json").write_text(json.dumps(comparison))
    return folder


def test_a_probe_that_names_no_rows_as_older_runs_have_it_is_shown(run, tmp_path):
    comparison = json.loads((folder := probed(run, tmp_path / "probed")).joinpath("comparison.json").read_text())
    for name in ("rows", "rows_taken", "rows_in_training_text"):
        del comparison["task"][name]
    (folder / "comparison.json").write_text(json.dumps(comparison))
    script.main([str(folder)])
    page = (folder / "report.html").read_text()
    assert "20 splits. 10 of them stand in the training text, without labels" in page
    assert "are taken" not in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_probe_s_curve_and_its_figures_are_on_the_page(run, browser, tmp_path, scheme):
    folder = probed(run, tmp_path / "probed")
    script.main([str(folder)])
    browser.open(folder / "report.html", width=390, scheme=scheme)
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    assert browser.js("return window.broken") is None
    [section] = browser.all("#task", "e.innerText")
    assert "1,000 documents of 2 classes" in section
    assert "20 splits" in section
    assert "10 of them stand in the training text (rows 0, 10, 20, 30, 40, …, counted from 0)" in section
    assert "Of 4,000 rows, 1,000 are taken, drawn by a fixed seed." in section
    cells = browser.all("#task tbody tr:first-child > *", "e.innerText")
    assert cells == ["logistic regression", "16", *["61.4%", "65.2%", "+3.80", "-0.40 to +8.01"] * 2]
    assert "at most" in browser.all("#task thead th", "e.innerText")[0].lower()
    last = browser.all("#task tbody tr:last-child > *", "e.innerText")
    assert last == ["nearest neighbours", "300", "61.4%", "61.4%", "+0.00", "no prediction differs", *cells[6:]]
    [curves] = browser.all("#task .chart", "e.data.map(t => [t.x, t.y, t.error_y?.array ?? null])")
    (x, before, _), (_, after, bars) = curves
    assert x == [16, 64, 300]
    assert before == [0.614] * 3
    assert after == [0.652] * 3
    assert bars == pytest.approx([0.0421] * 3)
    assert all(browser.all("#task tbody tr", "e.querySelector('th[scope=row]') !== null"))


def test_a_page_without_a_probe_has_no_section_for_it(run):
    assert 'id="task"' not in (run / "report.html").read_text()
