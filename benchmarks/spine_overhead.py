"""What smelt's training loop costs over a hand-written one: `python benchmarks/spine_overhead.py`, about three minutes.

Both train the same small Mistral on the same rows of the standard library with the same AdamW, clipping and schedule,
from the same weights, in turns (A B, B A, A B ...) in one process. Timed is the training from its first row to its end:
for smelt with log, progress and a checkpoint when one is due; for the loop by hand what one would write over
transformers, with none of these. Printed: the ratio of tokens per second, smelt over by hand, its median with a 95 %
bootstrap interval over the pairs; the seconds before the first row (once per training, whatever its length); and the
final losses: they must agree to six digits, or the run fails.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from smelt._train_loop import train
from smelt.data._tokens import Rows, tokenize
from smelt.data.stdlib import Stdlib
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model.mistral import Mistral
from smelt.train import Training, language_step


class Clocked(Rows):
    """Rows that note when the first of them is taken."""

    began = 0.0

    def __getitem__(self, index: int):
        if index == 0:
            self.began = time.perf_counter()
        return super().__getitem__(index)


def by_hand(model, rows, settings: Training) -> float:
    """A plain loop; the loss of its last step."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 - at / settings.steps)
    micro = settings.micro or settings.batch
    batches = iter(DataLoader(rows, batch_size=micro))
    last = 0.0
    model.train()
    for _ in range(settings.steps):
        total = torch.zeros(())
        for _ in range(settings.batch // micro):
            batch = next(batches)
            logits = model(input_ids=batch["input_ids"], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
            loss = loss / (settings.batch * settings.context)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        last = total.item()
    return last


def by_smelt(model, rows, settings: Training) -> float:
    with tempfile.TemporaryDirectory() as folder:
        log = train(model, rows, language_step(CrossEntropy(), ("student", "labels")), settings, Path(folder))
    return log["log"][-1]["loss"]


def interval(ratios: list[float], rounds: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of one training")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    asked = parser.parse_args()

    source = Mistral(layers=asked.layers, hidden=asked.hidden, vocab=2048, context=asked.context, data=Stdlib())
    model, tokenizer = source.create(0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    size = asked.steps * asked.batch * asked.context
    settings = Training(tokens=size, context=asked.context, batch=asked.batch, micro=asked.micro, schedule="linear", warmup=0.0, floor=0.0)
    with tempfile.TemporaryDirectory() as folder:
        tokens = tokenize(Stdlib(), "validation", tokenizer, Path(folder) / "tokens")
        rows = Clocked(tokens, asked.context, asked.steps * asked.batch, seed=0)
        ratios, starts, losses = [], [], {by_hand: 0.0, by_smelt: 0.0}
        for pair in range(-1, asked.pairs):  # the first pair warms up
            seconds = {}
            for way in (by_hand, by_smelt) if pair % 2 == 0 else (by_smelt, by_hand):
                model.load_state_dict(start)
                called = time.perf_counter()
                losses[way] = way(model, rows, settings)
                seconds[way] = time.perf_counter() - rows.began
                if way is by_smelt:
                    starts.append(rows.began - called)
            rates = {way: size / seconds[way] for way in seconds}
            if pair >= 0:
                ratios.append(rates[by_smelt] / rates[by_hand])
                shown = f"by hand {rates[by_hand]:,.0f} tokens/s, smelt {rates[by_smelt]:,.0f}, ratio {ratios[-1]:.4f}"
                print(f"pair {pair + 1}: {shown}", flush=True)
    low, high = interval(ratios)
    count = sum(p.numel() for p in model.parameters())
    print(
        f"{count / 1e6:.1f} M parameters, {asked.steps} steps of {asked.batch} x {asked.context} tokens, {torch.get_num_threads()} threads"
    )
    print(f"smelt starts in {statistics.median(starts):.2f} s")
    print(f"final loss: by hand {losses[by_hand]:.7f}, smelt {losses[by_smelt]:.7f}")
    print(
        f"tokens/s, smelt / by hand: {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}] over {len(ratios)} pairs; goal: at least 0.97"
    )
    if abs(losses[by_hand] - losses[by_smelt]) > 1e-6 * losses[by_hand]:
        print("the two did not do the same training", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
