#!/usr/bin/env python3
"""What adapters cost a decode step of an engine, and how long one takes to get in: Markdown tables.

    python scripts/lora_cost.py --engine ./engine --threads 2
    python scripts/lora_cost.py --engine ./engine --rank 64 --modules q_proj v_proj

Steps with and without adapters take turns in one run, so that ratios hold on a machine that others use, too; a ratio is
that of the medians. ``as built`` is another runtime of the same engine, opened without ``--enable-lora``. Adapters are
random; what they hold does not change what they cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from md_table import print_table

from llmctl.artifact.loader import LoadedEngine, load_engine
from llmctl.artifact.memory import human_bytes
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.checkpoint.adapters.adapter import Adapter, LowRank
from llmctl.checkpoint.adapters.reading import read_adapter
from llmctl.engine.step import LoraLimits, Runtime, SamplingBatch, SequenceSlice, StepPlan
from llmctl.graph.graph import Graph
from llmctl.targets.lora import lora_graph, lora_ops

BATCHES = (1, 32)
CONTEXT = 64


def random_adapter(graph: Graph, rank: int, modules: Sequence[str], seed: int) -> Adapter:
    """One of the graph's modules whose last names are ``modules``; none: of all."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, int]] = {}
    for op in lora_ops(graph):
        name, rows = op.attrs["module"], op.attrs["first_row"] + op.attrs["rows"]
        if not modules or name.rpartition(".")[2] in modules:
            shapes[name] = max(rows, shapes.get(name, (0, 0))[0]), graph.buffers[op.inputs[0]].width
    parts = tuple(
        LowRank(name, torch.randn(rank, k, generator=generator), torch.randn(n, rank, generator=generator) / 64, 0.1)
        for name, (n, k) in shapes.items()
    )
    return Adapter(Path(f"random{seed}"), parts)


def plan_of(slots: Sequence[int], block_size: int) -> StepPlan:
    """A decode step: a row a sequence, with the adapter in its slot."""
    blocks = -(-CONTEXT // block_size)
    return StepPlan(
        tuple(
            SequenceSlice(str(i), (5 + i,), CONTEXT - 1, tuple(range(blocks * i, blocks * (i + 1))), True, adapter=slot)
            for i, slot in enumerate(slots)
        )
    )


def seconds_of(runtime: Runtime, plan: StepPlan) -> float:
    """One step, from its start to its result."""
    rows = len(plan.slices)
    greedy = SamplingBatch(np.zeros(rows, np.float32), np.zeros(rows, np.uint64), np.full(rows, CONTEXT, np.int64))
    began = time.perf_counter()
    runtime.execute(plan, greedy).result()
    return time.perf_counter() - began


def medians(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Of each, in turns, after three of each that do not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, run in runs.items():
            seconds = run()
            if turn >= 3:
                found[name].append(seconds)
    return {name: median(times) for name, times in found.items()}


def step_rows(plain: Runtime, runtime: Runtime, adapters: int, rounds: int) -> list[list[str]]:
    """A row for each batch and kind of step: milliseconds, and against the engine as it was built."""
    rows = []
    for batch in BATCHES:
        kinds = {
            "as built": (plain, [-1] * batch),
            "no adapter": (runtime, [-1] * batch),
            "one row of them" if batch > 1 else "": (runtime, [0] + [-1] * (batch - 1)),
            f"{min(adapters, batch)} adapters" if batch > 1 else "its adapter": (
                runtime, [i % adapters for i in range(batch)]
            ),
        }  # fmt: skip
        kinds.pop("", None)
        plans = {name: (where, plan_of(slots, where.limits.block_size)) for name, (where, slots) in kinds.items()}
        runs = {name: (lambda w=where, p=plan: seconds_of(w, p)) for name, (where, plan) in plans.items()}  # type: ignore[misc]
        found = medians(runs, rounds)
        base = found["as built"]
        rows += [[str(batch), name, f"{1e3 * t:.2f}", f"{t / base:.3f}"] for name, t in found.items()]
    return rows


def swap_rows(runtime: Runtime, graph: Graph, adapter: Adapter, folder: Path, rounds: int) -> list[list[str]]:
    """How long an adapter takes from its files (in the page cache) to memory, and from there to its slot."""
    save(adapter, folder)
    host = runtime.adapters
    assert host is not None
    prepared = host.prepare(adapter)

    def timed(work: Callable[[], object]) -> Callable[[], float]:
        def run() -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        return run

    runs = {
        "read and checked, beside steps": timed(lambda: read_adapter(folder, graph)),
        "prepared, beside steps": timed(lambda: host.prepare(adapter)),
        "into a slot, between two steps": timed(lambda: host.put(0, prepared)),
    }
    return [[name, f"{1e3 * t:.2f}"] for name, t in medians(runs, max(3, rounds // 10)).items()]


def save(adapter: Adapter, folder: Path) -> None:
    """As PEFT does."""
    from safetensors.torch import save_file

    pieces = {
        f"base_model.model.{p.module}.lora_{n}.weight": t for p in adapter.parts for n, t in (("A", p.a), ("B", p.b))
    }
    save_file(pieces, folder / "adapter_model.safetensors")
    rank, modules = adapter.rank, sorted({part.module for part in adapter.parts})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def opened(engine: LoadedEngine, threads: int | None, lora: LoraLimits | None) -> Runtime:
    """A runtime with adapters, or without."""
    return open_runtime(replace(engine, request=replace(engine.request, lora=lora)), threads=threads)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--modules", nargs="*", default=(), help="last names, such as q_proj; all linears by default")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    lora = LoraLimits(options.adapters, options.rank, options.adapters)
    request = EngineRequest(max_num_seqs=max(BATCHES), kv_cache_bytes=256 << 20, lora=lora, whole_context=True)
    engine = load_engine(options.engine, request)
    graph = lora_graph(engine.graph, lora)
    adapters = [random_adapter(graph, options.rank, options.modules, seed) for seed in range(options.adapters)]
    plain, runtime = opened(engine, options.threads, None), opened(engine, options.threads, lora)
    host = runtime.adapters
    assert host is not None
    for slot, adapter in enumerate(adapters):
        host.put(slot, host.prepare(adapter))
    named = ", ".join(options.modules) or "all linears"
    slots = human_bytes(engine.target.adapter_bytes(graph, engine.options, lora))
    print(f"{engine.manifest.source.name}, {engine.manifest.target}: rank {options.rank}, {named}; slots {slots}\n")
    print_table(["batch", "step", "ms", "of as built"], step_rows(plain, runtime, options.adapters, options.rounds))
    with tempfile.TemporaryDirectory() as folder:
        rows = swap_rows(runtime, engine.graph, adapters[0], Path(folder), options.rounds)
    print_table(["swapping in", "ms"], rows)
    plain.close()
    runtime.close()


if __name__ == "__main__":
    main()
