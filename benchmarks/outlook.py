"""What came of runs of which prepare.py had said something: the records behind its sentence on what to expect.

Workload: one epoch over a text with a base, in chunks of 128 tokens, batches of 32 and a learning rate of 5e-4: film
reviews without markup, fewer and more of them, which are strange to a base that has read an encyclopedia; articles of
that encyclopedia, which are not; and hotel reviews in simplified Chinese with a base of traditional Chinese. Before
each run scripts/prepare.py gives its figures; the run's own gain on documents one by one, with its interval, stands
beside them. Peer: none is known. Ceiling: none is known.

    python benchmarks/outlook.py --data FOLDER

FOLDER holds imdb/, wikitext-2/, zh-hotel-reviews/ and models/. Writes benchmarks/results/outlook.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.reviews import sample
from mlm.files import write_json
from mlm.report.environment import environment

SCRIPTS = Path(__file__).parents[1] / "scripts"
HELD_OUT, ARTICLES, HOTELS = 300, 170, 2000  # documents
TRAINING = {"max_seq_length": 128, "learning_rate": 5e-4, "num_train_epochs": 1, "train_batch_size": 32, "seed": 42}
FIGURES = ("tokens_a_parameter", "pieces_a_word", "unknown_token_share", "perplexity", "perplexity_of_documents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the corpora and the models")
    parser.add_argument("--reviews", type=int, nargs="*", default=[500, 2000], help="film reviews to adapt on")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "outlook.json")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for what, model, files in workloads(args.data, args.reviews, Path(folder)):
            runs.append(record(what, args.data / "models" / model, files, Path(folder)) | classifier(what))
            print(json.dumps(runs[-1]), flush=True)
    write_json(args.out, {"runs": runs, "environment": environment(Accelerator(cpu=True))})


def workloads(data: Path, reviews: list[int], folder: Path) -> list[tuple[str, str, dict]]:
    """What is adapted to, the base, and the files as flags."""
    imdb, wiki, hotels = (data / name for name in ("imdb", "wikitext-2", "zh-hotel-reviews"))
    english, general = "bert-tiny-wikitext", {"out_of_domain_file": wiki / "validation.parquet"}
    held_out = {"validation_file": sample(imdb / "test.parquet", HELD_OUT, folder / "held_out.parquet")}
    found = []
    for number in reviews:
        train = {"train_file": sample(imdb / "train.parquet", number, folder / f"{number}.parquet")}
        found.append((f"{number:,} film reviews in English", english, train | held_out | general))
    articles = {"train_file": sample(wiki / "train.parquet", ARTICLES, folder / "articles.parquet")}
    articles |= {"validation_file": wiki / "validation.parquet"}
    found.append((f"{ARTICLES} of the articles that the base has learnt from", english, articles))
    chinese = {"train_file": sample(hotels / "train.parquet", HOTELS, folder / "hotels.parquet")}
    chinese |= {"validation_file": sample(hotels / "validation.parquet", HELD_OUT, folder / "hotels_held_out.parquet")}
    return [*found, (f"{HOTELS:,} hotel reviews in simplified Chinese", "ckip-albert-tiny-chinese", chinese)]


def record(what: str, model: Path, files: dict, folder: Path) -> dict:
    """What prepare.py says before a run, and what comes of it."""
    stores = {"model_name_or_path": model, "token_store": folder / "stores"}
    said = start("prepare.py", {**stores, **files, "max_seq_length": TRAINING["max_seq_length"]})["outlook"]
    run = folder / f"run{what}"
    results = start("train.py", {**stores, **files, **TRAINING, "output_dir": run})
    gain = {"gain": results["documents_gain"]}
    gain["gain_interval"] = [results["documents_gain_low"], results["documents_gain_high"]]
    other = "out_of_domain_perplexity"
    figures = {name: said[name] for name in FIGURES} | {other: said.get(other)}
    return {"what": what, "model": model.name, **figures, **gain}


def classifier(what: str) -> dict:
    """What probe.py has measured of the same run, if it has."""
    stored = json.loads((Path(__file__).parent / "results" / "probe.json").read_text())
    rows = [
        row["accuracy"]
        for run in stored["runs"]
        for row in run["probe"]["curve"]
        if what.startswith(f"{run['unlabelled']:,} film reviews") and row["classifier"] == "logistic regression"
    ]
    return {"classifier": {key: rows[-1][key] for key in ("difference", "interval")} if rows else None}


def start(script: str, flags: dict) -> dict:
    """What a script has on the last line of its output."""
    words = [f"--{name}={value}" for name, value in flags.items()]
    print(script, *words, flush=True)
    done = subprocess.run([sys.executable, SCRIPTS / script, *words], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
