"""What run_mlm_no_trainer does, written down as its users have it, as a peer to be timed.

Documents are tokenised and grouped by two `datasets.map`s, whose results the datasets library caches, so that
a second run finds them; transformers' collator masks lists of features in the loop's own process; all
positions go through the vocabulary projection, whose loss the model computes; AdamW as torch has it, without
decay on biases and norms; everything in fp32. It says `step N` after each optimizer step.

    python benchmarks/no_trainer_recipe.py --model_name_or_path CHECKPOINT --train_file train.parquet \
        --validation_file validation.parquet --output_dir FOLDER

The last line of standard output is one JSON object.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import datasets
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    get_scheduler,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.peers import run_mlm_maps


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True, help="parquet")
    parser.add_argument("--validation_file", required=True, help="parquet")
    parser.add_argument("--max_seq_length", type=int, default=128, help="tokens in a chunk")
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--per_device_eval_batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=5e-5)
    parser.add_argument("--num_train_epochs", type=int, default=3)
    parser.add_argument("--max_train_steps", type=int)
    parser.add_argument("--mlm_probability", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output_dir", required=True)
    return parser.parse_args()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: torch.nn.Module, batches: DataLoader, batch_size: int) -> float:
    """Perplexity by the mean of batch losses, under masks that are drawn anew each time."""
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss.repeat(batch_size)) for batch in batches]
    return math.exp(torch.cat(losses).mean().item())


def load_batches(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[DataLoader, DataLoader]:
    """The batches for training, and for evaluation."""
    files = {"train": args.train_file, "validation": args.validation_file}
    documents = datasets.load_dataset("parquet", data_files=files, columns=["text"])
    chunks = {split: run_mlm_maps(documents[split], tokenizer, args.max_seq_length, None) for split in documents}
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=args.mlm_probability)
    train_batches = DataLoader(
        chunks["train"], shuffle=True, collate_fn=collator, batch_size=args.per_device_train_batch_size
    )
    eval_batches = DataLoader(chunks["validation"], collate_fn=collator, batch_size=args.per_device_eval_batch_size)
    return train_batches, eval_batches


def make_optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """AdamW in the two groups that the script has, whose decay is 0 by default in both."""
    plain = ("bias", "LayerNorm.weight")
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if not any(end in name for end in plain)], "weight_decay": 0.0},
        {"params": [p for name, p in named if any(end in name for end in plain)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate)


def main() -> None:
    args = parse_arguments()
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision="no")
    transformers.utils.logging.set_verbosity_error()
    set_seed(args.seed)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForMaskedLM.from_pretrained(args.model_name_or_path, config=config)
    train_batches, eval_batches = load_batches(args, tokenizer)
    optimizer = make_optimizer(model, args.learning_rate)
    steps = args.max_train_steps or args.num_train_epochs * len(train_batches)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=steps)
    model, optimizer, train_batches, eval_batches, scheduler = accelerator.prepare(
        model, optimizer, train_batches, eval_batches, scheduler
    )

    progress, step, perplexity = tqdm(total=steps, file=sys.stderr), 0, math.nan
    while step < steps:
        model.train()
        for batch in train_batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            step += 1
            progress.update()
            print(f"step {step}", flush=True)
            if step == steps:
                break
        perplexity = evaluate(accelerator, model, eval_batches, args.per_device_eval_batch_size)
    accelerator.unwrap_model(model).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    print(json.dumps({"perplexity": perplexity, "steps": steps}))


if __name__ == "__main__":
    main()
