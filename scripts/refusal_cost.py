#!/usr/bin/env python3
"""What refusing a request costs the API process, by the bytes of its body: every endpoint that takes one, many forms.

    python scripts/refusal_cost.py --model ENGINE
    python scripts/refusal_cost.py --model ENGINE --kib 400 --only chat --json

Bodies of many tiny values, each wrong in one place (``refusal_bodies.py``), are given to the app in this process: no
HTTP, no engine. The table has the least CPU time of all that the app does, less that of the same request with a body
of one byte, in ms per 100 KB; beside it, of the same bytes, what msgspec takes to look over them without making
anything, and to make objects of them: the least of several, for what else a machine does only adds. A refusal is to
take no more than 1 ms, or than to make the objects where that is dearer. Exit code 1 when a body is not refused.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from md_table import print_table
from refusal_bodies import bodies
from starlette.applications import Starlette

from llmctl.bench.environment import describe_environment
from llmctl.config import ServeConfig
from llmctl.serving.app import create_app
from llmctl.serving.client import AsyncEngineClient
from llmctl.serving.context import Model, ServerContext
from llmctl.serving.keys import ServerKeys
from llmctl.serving.metrics import ServerMetrics
from llmctl.serving.redaction import Redactor
from llmctl.serving.wire import EngineInfo
from llmctl.text.tokenizer import Tokenizer

CONTEXT = 8192
BOUND_MS = 1.0
_SKIM = msgspec.json.Decoder(msgspec.Raw)


@dataclass(frozen=True)
class Cost:
    """One body. Times are CPU ms per 100 KB; ``skim`` and ``objects``: of msgspec, NaN where it finds it malformed."""

    path: str
    name: str
    status: int
    message: str
    size: int
    ms: float
    skim: float
    objects: float


def app_of(folder: Path) -> Starlette:
    """The app of a server whose worker takes what it is sent, and never answers."""
    config, keys, metrics = ServeConfig(model=str(folder)), ServerKeys(None), ServerMetrics("m")
    client = AsyncEngineClient(config, metrics, stall_timeout=600.0)
    tokenizer = Tokenizer.from_folder(folder)
    size = tokenizer.vocab_size
    info = EngineInfo("m", "llama", "cpu", "none", "bfloat16", CONTEXT, 16, 4096, size, 576, 0, 0, "int8", 64, 512)
    client.worker.tokenizer, client.worker.info = tokenizer, info
    client.worker.send = lambda _: None  # type: ignore[method-assign]
    client.admit()
    context = ServerContext(config, ("m",), client, metrics, keys, Redactor(keys))
    context.loaded = Model.from_folder("m", folder, tokenizer, info, config)
    return create_app(context)


async def post(app: Starlette, path: str, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer."""
    scope = {
        **{"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""},
        **{"root_path": "", "scheme": "http", "http_version": "1.1", "state": {}},
        **{"client": ("10.0.0.1", 1), "server": ("10.0.0.2", 1)},
        "headers": [(b"content-type", b"application/json")],
    }
    given: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    given.put_nowait({"type": "http.request", "body": data, "more_body": False})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, given.get, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


async def measure(app: Starlette, path: str, name: str, data: bytes, repeats: int) -> Cost:
    """The cost of one body."""
    status, answer = await post(app, path, data)
    times, least = [], []
    for _ in range(repeats):  # in turn, so that what changes with time meets both alike
        for given, found in ((data, times), (b"0", least)):
            began = time.process_time()
            await post(app, path, given)
            found.append(time.process_time() - began)
    per = 1e3 / (len(data) / 1e5)
    message = _message(answer)
    return Cost(
        path,
        name,
        status,
        message,
        len(data),
        (min(times) - min(least)) * per,
        _seconds(lambda: _SKIM.decode(data), repeats) * per,
        _seconds(lambda: msgspec.json.decode(data), repeats) * per,
    )


def _message(answer: bytes) -> str:
    found = json.loads(answer)
    return str(found["error"]["message"] if isinstance(found.get("error"), dict) else found.get("error", found))


def _seconds(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.process_time()
        try:
            work()
        except (ValueError, RecursionError):
            return float("nan")
        times.append(time.process_time() - began)
    return min(times)


def show(costs: Sequence[Cost]) -> None:
    """The table, the dearest first."""
    head = ["endpoint", "body", "status", "ms per 100 KB", "to skim", "to make objects", "refused for"]
    rows = [
        [c.path, c.name, str(c.status), f"{c.ms:.2f}", f"{c.skim:.2f}", f"{c.objects:.2f}", c.message[:60]]
        for c in sorted(costs, key=lambda c: -c.ms)
    ]
    print_table(head, rows)
    values = [c.ms for c in costs]
    print(f"{len(costs)} bodies: median {median(values):.2f} ms per 100 KB, the dearest {max(values):.2f}")
    beyond = sum(c.ms > max(c.objects if c.objects == c.objects else 0.0, BOUND_MS) for c in costs)  # NaN: malformed
    print(f"{beyond} above both {BOUND_MS:g} ms and what it takes to make objects")


def main() -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="a folder with a tokenizer, as of an engine")
    parser.add_argument("--kib", type=int, default=100, help="size of a body (100)")
    parser.add_argument("--repeats", type=int, default=21, help="of each body (21)")
    parser.add_argument("--only", default="", help="cases whose endpoint or name has this in it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    app = app_of(args.model)
    cases = [c for c in bodies(1024 * args.kib) if args.only in f"{c[0]} {c[1]}"]

    async def all_of_them() -> list[Cost]:
        return [await measure(app, *case, args.repeats) for case in cases]

    costs = asyncio.run(all_of_them())
    if args.json:
        document = {"environment": describe_environment(), "costs": [asdict(cost) for cost in costs]}
        print(json.dumps(document))
    else:
        show(costs)
    let_in = [cost for cost in costs if cost.status < 400]
    for cost in let_in:
        print(f"not refused: {cost.path}, {cost.name}", file=sys.stderr)
    return 1 if let_in else 0


if __name__ == "__main__":
    sys.exit(main())
