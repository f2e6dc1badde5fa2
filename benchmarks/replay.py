"""What replay keeps of a model's own domain, and what it costs: perplexities in the new domain and outside of it.

Workload: one epoch over IMDb reviews without markup, drawn with a fixed seed, into which text that the model knows,
WikiText-2, is mixed in several shares. Whatever the share, the reviews are seen in the same order under the same
masks, so that the runs of a seed are paired; the replay takes steps of its own. In the domain: a held-out part of the
reviews; out of it: WikiText-2's validation articles, which no run trains on. Peer: a share of 0, which is training
without replay. Ceiling: the model before it was adapted, which has forgotten nothing.

    python benchmarks/replay.py --imdb FOLDER --wikitext FOLDER --model_name_or_path CHECKPOINT

The folders hold train.parquet and test.parquet, and train.parquet and validation.parquet, with a column `text`. Writes
benchmarks/results/replay.json.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.reviews import sample
from mlm.config import Config
from mlm.files import write_json
from mlm.report.environment import environment
from mlm.train import train

TRAINING = {"max_seq_length": 128, "learning_rate": 5e-4, "num_train_epochs": 1, "train_batch_size": 32}
KEPT = ("perplexity", "out_of_domain_perplexity", "steps", "epochs", "replay_epochs", "train_loss_replay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imdb", type=Path, required=True, help="folder of train.parquet and test.parquet")
    parser.add_argument("--wikitext", type=Path, required=True, help="folder of train.parquet and validation.parquet")
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--reviews", type=int, default=1000, help="to train on")
    parser.add_argument("--held_out", type=int, default=150, help="reviews")
    parser.add_argument("--articles", type=int, default=20, help="of WikiText-2, held out")
    parser.add_argument("--shares", type=float, nargs="+", default=[0, 0.1, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of order, masks and dropout")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replay.json")
    args = parser.parse_args()
    where = environment(Accelerator(cpu=True))
    with tempfile.TemporaryDirectory() as folder:
        runs, before = measure(args, Path(folder))
    write_json(
        args.out,
        {
            "what": f"one epoch over {args.reviews:,} IMDb reviews without markup, and replay of WikiText-2",
            "model": args.model_name_or_path.name,
            "before": before,
            "runs": runs,
            "environment": where,
        },
    )


def measure(args: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """The figures of each run, and the two perplexities of the model before."""
    texts = {
        "train_file": (args.imdb / "train.parquet", args.reviews),
        "validation_file": (args.imdb / "test.parquet", args.held_out),
        "out_of_domain_file": (args.wikitext / "validation.parquet", args.articles),
    }
    settings = {
        **TRAINING,
        **{flag: str(sample(*text, folder / f"{flag}.parquet")) for flag, text in texts.items()},
        "model_name_or_path": str(args.model_name_or_path),
        "token_store": str(folder / "stores"),
        "eval_steps": 10**6,
        "overwrite_output_dir": True,
        "output_dir": str(folder / "run"),
    }
    runs: list[dict[str, Any]] = []
    before: dict[str, float] = {}
    for seed in args.seeds:
        for share in args.shares:
            replay = {"replay_file": str(args.wikitext / "train.parquet"), "replay_share": share} if share else {}
            found = train(Config.of(**settings, **replay, seed=seed, eval_on_start=not runs)).results
            before = before or {name: found[f"{name}_before"] for name in KEPT[:2]}
            runs.append({"share": share, "seed": seed, **{name: found[name] for name in KEPT if name in found}})
            print(runs[-1], flush=True)
    return runs, before


if __name__ == "__main__":
    main()
