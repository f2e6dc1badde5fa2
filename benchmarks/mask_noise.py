"""How much of a perplexity is the luck of its masks: of one mask round, of K mask rounds, and of K folds.

Workload: IMDb reviews without markup, drawn with a fixed seed, chunks of 128, 15% masked. A mask round is
evaluated under many mask seeds. One figure of K rounds is over K of these, and costs as much as one of K
folds, which predict each token exactly once. The spread is that of the figures over seeds: the documents stay
the same. Peer: one mask round, of which evaluations consist elsewhere. Ceiling: no spread at all.

    python benchmarks/mask_noise.py --imdb FOLDER --model_name_or_path CHECKPOINT

FOLDER holds test.parquet with a column `text`. Writes benchmarks/results/mask_noise.json.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.reviews import sample
from mlm.data.chunks import ChunkConfig
from mlm.data.corpus import CorpusConfig
from mlm.data.token_store import TokenStoreConfig, prepare
from mlm.data.tokenizer import load_tokenizer, tokenizer_info
from mlm.evaluation.eval_set import EvaluateConfig, make_eval_set
from mlm.evaluation.evaluate import evaluate
from mlm.files import write_json
from mlm.model.load import ModelConfig, load_model
from mlm.model.sparse_head import SparseMaskedLM
from mlm.report.environment import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--imdb", type=Path, required=True, help="folder of test.parquet")
    parser.add_argument("--model_name_or_path", type=Path, required=True)
    parser.add_argument("--held_out", type=int, default=40, help="reviews")
    parser.add_argument("--folds", type=int, default=7)
    parser.add_argument("--figures", type=int, default=10, help="perplexities, each under masks of its own")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mask_noise.json")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=True)
    tokenizer = load_tokenizer(str(args.model_name_or_path))
    info = tokenizer_info(tokenizer)
    model = load_model(ModelConfig(model_name_or_path=str(args.model_name_or_path)), tokenizer, seed=0)
    sparse = SparseMaskedLM(model)
    K, n = args.folds, args.figures
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = CorpusConfig(
            validation_file=str(sample(args.imdb / "test.parquet", args.held_out, Path(folder, "v.parquet")))
        )
        store = prepare(corpus, tokenizer, info, TokenStoreConfig(token_store=folder))["validation"]
        kinds = {
            "one mask round": EvaluateConfig(eval_mask_seeds=n * K),
            f"{K} folds": EvaluateConfig(eval_mask_seeds=n, eval_mask_folds=K),
        }
        for name, config in kinds.items():
            eval_set = make_eval_set("IMDb", store, ChunkConfig(), 128, info, config)
            started = time.perf_counter()
            parts = evaluate(sparse, eval_set, accelerator).seeds(config)
            seconds = time.perf_counter() - started
            results[name] = spread([part.loss for part in parts], parts[0].masked, seconds / len(parts))
            if config.eval_mask_folds is None:  # K seeds at a time
                groups = [parts[first : first + K] for first in range(0, n * K, K)]
                losses = [sum(p.nats.sum() for p in g) / sum(p.masked for p in g) for g in groups]
                masked = sum(part.masked for part in groups[0])
                results[f"{K} mask rounds"] = spread(losses, masked, K * seconds / len(parts))
            print(results, flush=True)
    write_json(
        args.out,
        {
            "what": f"perplexity of {args.held_out} IMDb reviews without markup under many mask seeds",
            "model": args.model_name_or_path.name,
            "chunks": len(eval_set.chunk_ids),
            "results": results,
            "environment": environment(accelerator),
        },
    )


def spread(losses: list[float], masked: int, seconds: float) -> dict:
    """Of a figure over mask seeds: losses in nats a masked token, one for each figure."""
    perplexities = np.exp(losses)
    return {
        "figures": len(losses),
        "masked_tokens": masked,
        "seconds": seconds,
        "perplexity": float(np.exp(np.mean(losses))),
        "perplexity_min": float(perplexities.min()),
        "perplexity_max": float(perplexities.max()),
        "perplexity_std": float(perplexities.std(ddof=1)),
        "loss_std": float(np.std(losses, ddof=1)),
    }


if __name__ == "__main__":
    main()
