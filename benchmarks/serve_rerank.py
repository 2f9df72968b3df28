"""Batched against one at a time: `python benchmarks/serve_rerank.py`, about five minutes on one core.

64 clients ask `smelt serve` at once, each a question of its own, and ask again when they are answered. The same model
stands behind two servers of one process: one that asks about up to `--batch` waiting requests together, one that takes
them one by one (`Limits(batch=1)`); only one of them is asked at a time, in turns (A B, B A, ...). Printed for /v1/rerank
and /v1/embeddings: requests per second of both, the ratio, its median with a 95 % bootstrap interval over the pairs, and
the longest wait. Both must give the same orders, or vectors that agree to 1e-3, or the run fails.

    python benchmarks/serve_rerank.py --rank 'sliding_window(window=10, step=5)' --documents 20 --words 20
    python benchmarks/serve_rerank.py --quick        # a tiny random model, seconds; its figures mean nothing
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import uvicorn

from smelt import serve
from smelt._serve_engine import Limits
from smelt.model._load import Loaded, load
from smelt.model._tiny import tiny, tiny_tokenizer

NAMES = ("path", "index", "value", "name", "left", "result", "return", "import", "list", "sort", "open", "file", "match", "text")


@contextmanager
def serving(loaded: Loaded, rank: str | None, batch: int) -> Iterator[int]:
    """The port of a server in a thread of this process."""
    ready = serve.served(loaded.model, loaded.tokenizer, "model", Limits(batch=batch, seconds=600.0), rank=rank, folder=loaded.folder)
    listening = serve._listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(serve.application(ready), log_config=None, log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        ready.engine.close()
        server.should_exit = True
        thread.join(10)
        listening.close()


def bodies(kind: str, asked: Any, draw: random.Random) -> list[dict[str, Any]]:
    def text() -> str:
        return " ".join(draw.choice(NAMES) for _ in range(draw.randint(asked.words // 2, asked.words)))

    if kind == "embeddings":
        return [{"input": text()} for _ in range(asked.clients * asked.requests)]
    return [{"query": text(), "documents": [text() for _ in range(asked.documents)]} for _ in range(asked.clients * asked.requests)]


def asking(port: int, kind: str, some: Sequence[dict[str, Any]]) -> list[tuple[float, Any]]:
    """One client: (seconds, answer) of each question, one after another."""
    connection, found = http.client.HTTPConnection("127.0.0.1", port, timeout=600), []
    for body in some:
        began = time.perf_counter()
        connection.request("POST", f"/v1/{kind}", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = json.loads(answer.read())
        if answer.status != 200:
            raise SystemExit(f"{answer.status}: {said['error']['message']}")
        found.append((time.perf_counter() - began, said))
    connection.close()
    return found


def load_on(port: int, kind: str, every: Sequence[dict[str, Any]], clients: int) -> tuple[float, float, list[Any]]:
    """Seconds of all, the longest wait, and the answers."""
    with ThreadPoolExecutor(clients) as pool:
        began = time.perf_counter()
        found = list(pool.map(lambda at: asking(port, kind, every[at::clients]), range(clients)))
        spent = time.perf_counter() - began
    return spent, max(wait for client in found for wait, _ in client), [said for client in found for _, said in client]


def agree(kind: str, some: list[Any], others: list[Any]) -> bool:
    if kind == "rerank":
        return [[r["index"] for r in a["results"]] for a in some] == [[r["index"] for r in b["results"]] for b in others]
    here, there = (torch.tensor([a["data"][0]["embedding"] for a in answers]) for answers in (some, others))
    return torch.allclose(here, there, atol=1e-3)


def interval(ratios: list[float], rounds: int = 10_000) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    drawn = random.Random(0)
    medians = sorted(statistics.median(drawn.choices(ratios, k=len(ratios))) for _ in range(rounds))
    return medians[int(0.025 * rounds)], medians[int(0.975 * rounds)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rank", help="a judge or strategy; the server's default when left out")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2, help="of each client and round")
    parser.add_argument("--documents", type=int, default=10)
    parser.add_argument("--words", type=int, default=12, help="of the longest query or document")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny random model, 8 clients, 2 pairs")
    asked = parser.parse_args(words)
    if asked.quick:
        asked.clients, asked.requests, asked.documents, asked.words, asked.pairs = 8, 1, 4, 6, 2
        loaded = Loaded(tiny("llama", context=2048), tiny_tokenizer(context=2048), None)  # type: ignore[arg-type]
    else:
        loaded = load(asked.model)
    good = True
    print(f"{asked.clients} clients, {torch.get_num_threads()} threads of torch, {asked.documents} documents of up to {asked.words} words")
    with serving(loaded, asked.rank, asked.batch) as together, serving(loaded, asked.rank, 1) as alone:
        for kind in ("rerank", "embeddings"):
            ratios, waits, rates = [], {together: 0.0, alone: 0.0}, {together: 0.0, alone: 0.0}
            for pair in range(-1, asked.pairs):  # the first pair warms up
                every = bodies(kind, asked, random.Random(pair))
                said = {}
                for port in (together, alone) if pair % 2 == 0 else (alone, together):
                    spent, longest, said[port] = load_on(port, kind, every, asked.clients)
                    rates[port], waits[port] = len(every) / spent, max(waits[port], longest) if pair >= 0 else 0.0
                good = good and agree(kind, said[together], said[alone])
                if pair >= 0:
                    ratios.append(rates[together] / rates[alone])
                    shown = f"together {rates[together]:.1f} requests/s, one by one {rates[alone]:.1f}, ratio {ratios[-1]:.3f}"
                    print(f"{kind}, pair {pair + 1}: {shown}", flush=True)
            low, high = interval(ratios)
            wait = f"longest wait {waits[together]:.2f} s together, {waits[alone]:.2f} s one by one"
            print(f"{kind}: requests/s, together / one by one: {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}]; {wait}")
    if not good:
        print("the two did not give the same answers", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
