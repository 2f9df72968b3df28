"""Load on `smelt serve`: clients that stream all the time, beside readers that are slow, that go away, and that send nonsense.

    python benchmarks/serve_load.py                                      # 64 clients for two minutes on the embedded model
    python benchmarks/serve_load.py --seconds 20 --clients 8 -- --decode 'prompt_lookup()'

What stands behind `--` goes to `smelt serve`. Printed: answers, those lost (an error, or a stream without its end), tokens
per second of the steady clients, time to the first token, refused nonsense with a wrong status, and the server's resident
memory at the start (after a fifth of the time, when every buffer has been used once) and at the end. Exit code 1 when an
answer was lost, a status was wrong, the server is gone, or memory grew by more than a tenth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

BAD = (
    (b"{", 400),
    (b'{"model": 1}', 400),
    (b'{"model": "nobody", "prompt": "x"}', 404),
    (b'{"model": "embedded", "prompt": {}}', 400),
    (b"[" * 5000, 400),
    (b"x" * (1 << 21), 413),
)


async def send(port: int, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return reader, writer


def asked(draw: random.Random, model: str, most: int) -> bytes:
    names = [draw.choice(("path", "index", "value", "name", "left", "result")) for _ in range(draw.randint(1, 20))]
    prompt = f"def f({', '.join(names)}):\n    return"
    sampled = {"temperature": 0} if draw.random() < 0.75 else {"temperature": 0.8, "top_p": 0.95}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({"model": model, "prompt": prompt, "max_tokens": draw.randint(most // 2, most), **sampled, **options}).encode()


async def steady(number: int, args: Any, port: int, model: str, until: float, seen: Counter, first: list[float]) -> None:
    draw = random.Random(number)
    while time.monotonic() < until:
        began, ended, writer = time.monotonic(), False, None
        try:
            reader, writer = await send(port, asked(draw, model, args.tokens))
            known = False
            async for line in reader:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if not known:
                        first.append(time.monotonic() - began)
                        known = True
                    seen["tokens"] += (event.get("usage") or {}).get("completion_tokens", 0)
                ended = ended or line.startswith(b"data: [DONE]")
        except OSError as error:
            seen[type(error).__name__] += 1
        finally:
            if writer is not None:
                writer.close()
        seen["answers" if ended else "lost"] += 1


async def slow(number: int, args: Any, port: int, model: str, until: float, seen: Counter) -> None:
    draw = random.Random(1000 + number)
    while time.monotonic() < until:
        reader, writer = await send(port, asked(draw, model, args.tokens))
        while time.monotonic() < until and await reader.read(16):
            await asyncio.sleep(0.2)
        writer.close()
        seen["slow readers"] += 1


async def cutting(number: int, args: Any, port: int, model: str, until: float, seen: Counter) -> None:
    draw = random.Random(2000 + number)
    while time.monotonic() < until:
        reader, writer = await send(port, asked(draw, model, 10 * args.tokens))
        await reader.read(draw.choice((1, 200, 600)))
        writer.transport.abort()
        seen["cut"] += 1
        await asyncio.sleep(0.5)


async def nonsense(port: int, until: float, seen: Counter) -> None:
    while time.monotonic() < until:
        for body, status in BAD:
            reader, writer = await send(port, body)
            line = await reader.readline()
            writer.close()
            seen["nonsense"] += 1
            if line.split()[1:2] != [str(status).encode()]:
                seen["wrong status"] += 1
        await asyncio.sleep(1)


async def load(args: Any, port: int, model: str, child: subprocess.Popen) -> bool:
    seen: Counter = Counter()
    first: list[float] = []
    memory = psutil.Process(child.pid)
    began = time.monotonic()
    until = began + args.seconds
    work = [steady(i, args, port, model, until, seen, first) for i in range(args.clients)]
    work += [slow(i, args, port, model, until, seen) for i in range(args.odd)]
    work += [cutting(i, args, port, model, until, seen) for i in range(args.odd)]
    tasks = [asyncio.ensure_future(one) for one in [*work, nonsense(port, until, seen)]]
    await asyncio.sleep(args.seconds / 5)
    start = memory.memory_info().rss
    await asyncio.gather(*tasks)
    spent = time.monotonic() - began
    await asyncio.sleep(1)
    alive = child.poll() is None
    end = memory.memory_info().rss if alive else 0
    print(f"{args.clients} clients, {spent:.0f} s: " + ", ".join(f"{name} {count}" for name, count in sorted(seen.items())))
    rate, typical = seen["tokens"] / spent, statistics.median(first)
    print(f"{rate:.0f} tokens/s in all, first token after {typical:.2f} s (median), {max(first):.2f} s at most")
    print(f"resident memory {start / 1e6:.0f} MB -> {end / 1e6:.0f} MB; answers lost: {seen['lost']}; server {'up' if alive else 'DOWN'}")
    return alive and not seen["lost"] and not seen["wrong status"] and end < 1.1 * start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--odd", type=int, default=4, help="slow readers, and as many that cut their connections")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--tokens", type=int, default=32, help="of the longest answers")
    parser.add_argument("options", nargs="*", help="options of smelt serve, behind --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        command = [sys.executable, "-m", "smelt", "serve", args.model, "--name", "embedded", "--port", "0", *args.options]
        with log.open("wb") as file:
            child = subprocess.Popen(command, stdout=file, stderr=file, env={k: v for k, v in os.environ.items() if k != "SMELT_TOKEN"})
        try:
            while " at http://127.0.0.1:" not in log.read_text():
                if child.poll() is not None:
                    sys.exit(log.read_text())
                time.sleep(0.2)
            port = int(log.read_text().split(" at http://127.0.0.1:")[1].split("/")[0])
            good = asyncio.run(load(args, port, "embedded", child))
        finally:
            child.terminate()
            try:
                child.wait(40)
            except subprocess.TimeoutExpired:
                child.kill()
        print(f"exit code of the server after SIGTERM: {child.returncode}")
    sys.exit(0 if good and child.returncode == 0 else 1)


if __name__ == "__main__":
    main()
