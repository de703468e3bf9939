"""Part ``right``: small models on the CUDA runtime against the reference, position by position.

Steps are made by hand (prompts whole and in chunks, mixed batches, decode batches of every size), their logits held to
twice the error that the reference itself has in that dtype; a runtime that replays must give the bits of one that does
not. Then whole requests go through the engine, one and two steps in flight, in a pool so small that some are preempted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine_check.models import BLOCK
from engine_check.place import Place
from engine_check.steps import Sequences, greedy, prompt, seeded
from engine_check.tiny import Heads, Oracle, Size, TinyModel, Variant, oracle
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.targets.base import RuntimeSizes
from llmctl.targets.reference.philox import uniform

_WIDE, _LONE, _EQUAL = Heads(4, 2, 64), Heads(2, 1, 128), Heads(4, 4, 64)
VARIANTS = (
    Variant("w4", "bfloat16", "same", _WIDE), Variant("dense", "bfloat16", "same", _LONE),
    Variant("w8", "float16", "int8", _EQUAL), Variant("w4", "float16", "fp8_e4m3", _LONE),
    Variant("w4", "bfloat16", "int8", _LONE, "qwen3"), Variant("dense", "float16", "fp8_e4m3", _WIDE),
    Variant("w8", "bfloat16", "same", _LONE), Variant("w4", "float16", "same", _EQUAL),
    Variant("dense", "bfloat16", "int8", _EQUAL), Variant("w8", "bfloat16", "fp8_e4m3", _WIDE),
    Variant("dense", "float16", "same", _WIDE, "qwen3"), Variant("w4", "bfloat16", "fp8_e4m3", _EQUAL),
    Variant("w8", "float16", "same", _WIDE), Variant("w4", "float16", "int8", _WIDE),
    Variant("dense", "float16", "int8", _LONE), Variant("w8", "bfloat16", "int8", _WIDE),
    Variant("dense", "bfloat16", "fp8_e4m3", _LONE), Variant("w8", "float16", "fp8_e4m3", _LONE),
)  # fmt: skip
"""Every quantization with every dtype and KV cache; the most telling first, so that few of them tell much."""


@dataclass(frozen=True)
class Scale:
    """How much is run.

    Attributes:
        prompts: tokens of each hand-made sequence. more: tokens that each goes on for, one a step.
        chunk: most tokens of a prompt in one step of the chunked runs. batches: sizes of the decode batches.
        requests: (prompt tokens, tokens out) of what goes through the engine. blocks: KV blocks of the runtime.
        tokens, seqs: of the largest step. budget: tokens a step of the engine.
    """

    size: Size = field(default_factory=Size)
    prompts: tuple[int, ...] = (75, 3, 18, 1, 40, 16, 33, 130)
    more: int = 12
    chunk: int = 33
    batches: tuple[int, ...] = (8, 1, 2, 3, 4, 5, 6, 7)
    requests: tuple[tuple[int, int], ...] = (
        (90, 24), (20, 40), (64, 30), (5, 44), (130, 20), (47, 30), (1, 36), (80, 24), (33, 12), (90, 24),
    )  # fmt: skip
    blocks: int = 32
    tokens: int = 512
    seqs: int = 8
    budget: int = 48


def check(place: Place, variant: Variant, scale: Scale, arch: str) -> dict[str, Any]:
    """Everything about one variant: figures, and ``wrong``: what is not as it should be."""
    model = TinyModel(variant, scale.size, arch)
    texts = [prompt(n + scale.more, scale.size.vocab, i) for i, n in enumerate(scale.prompts)]
    judge = oracle(model, texts, max(a + b for a, b in scale.requests))
    planes = model.planes(place.device)
    place.synchronize()  # a runtime has a stream of its own
    wrong: list[str] = []
    result: dict[str, Any] = {"limit": judge.limit, "own error": judge.noise}
    runtime = place.open(model.graph, model.options, planes, _sizes(scale, eager=place.graphs))
    try:
        eager = run_by_hand(runtime, texts, scale)
        result |= judged(judge, eager, wrong)
        result["seeded"] = seeded_tokens(runtime, texts, scale, wrong)
    finally:
        runtime.close()
    runtime = place.open(model.graph, model.options, planes, _sizes(scale, eager=False))
    try:
        if place.graphs:
            result["replays"] = compared(eager, run_by_hand(runtime, texts, scale), wrong)
        result |= through_engine(runtime, judge, scale, wrong)
    finally:
        runtime.close()
        place.free()
    return {**result, "wrong": wrong[:6], "wrong in all": len(wrong)}


def _sizes(scale: Scale, eager: bool) -> RuntimeSizes:
    return RuntimeSizes(scale.blocks, BLOCK, scale.size.positions, scale.tokens, scale.seqs, enforce_eager=eager)


# ---- steps made by hand ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """The logits after one position of one text, and the token sampled from them in the step ``place``.

    ``decode``: every sequence of the step had one token. ``execution``: how the runtime says that it ran.
    """

    place: str
    decode: bool
    text: int
    position: int
    logits: Tensor
    token: int
    execution: str


Counts = Iterator[list[int]]


def whole_then_decode(sequences: Sequences, scale: Scale) -> Counts:
    """All prompts but the second in one step, that one among the others' first decode steps."""
    yield [0 if i == 1 else n for i, n in enumerate(scale.prompts)]
    for step in range(scale.more):
        yield [scale.prompts[1] if i == 1 and step == 0 else 1 for i in range(len(scale.prompts))]
    while any(counts := [min(1, sequences.left(i)) for i in range(len(scale.prompts))]):
        yield counts


def in_chunks(sequences: Sequences, scale: Scale) -> Counts:
    """Pieces of random sizes, of some sequences a step."""
    rng = np.random.default_rng(7)
    everyone = range(len(scale.prompts))
    while any(sequences.left(i) for i in everyone):
        counts = [min(int(rng.integers(0, scale.chunk)) // (1 + 3 * (i % 2)), sequences.left(i)) for i in everyone]
        if any(counts):
            yield counts


def in_batches(sequences: Sequences, scale: Scale) -> Counts:
    """All prompts at once, then one token each of the first so many sequences, for every size of a batch."""
    yield list(scale.prompts)
    for size in scale.batches:
        if all(sequences.left(i) for i in range(size)):
            yield [1] * size + [0] * (len(scale.prompts) - size)


SCENARIOS: dict[str, Callable[[Sequences, Scale], Counts]] = {
    "whole": whole_then_decode, "chunks": in_chunks, "batches": in_batches,
}  # fmt: skip


def run_by_hand(runtime: Any, texts: Sequence[Sequence[int]], scale: Scale) -> list[Row]:
    """Every scenario's rows: a step's logits, then the same step executed, whose greedy tokens come with them."""
    rows = []
    for name, counts in SCENARIOS.items():
        sequences = Sequences(texts, scale.blocks, BLOCK)
        for number, step in enumerate(counts(sequences, scale)):
            plan, members = sequences.plan(step)
            logits = runtime.logits(plan).float().cpu()
            result = runtime.execute(plan, greedy(len(members))).result()
            decode = sum(step) == len(members)
            for row, i in enumerate(members):
                place, token = f"{name}, step {number}", int(result.token_ids[row])
                rows.append(Row(place, decode, i, sequences.done[i] - 1, logits[row], token, result.execution))
    return rows


def judged(judge: Oracle, rows: Sequence[Row], wrong: list[str]) -> dict[str, Any]:
    """Errors against the reference, and whether sampled tokens are the logits' own."""
    worst, same = 0.0, 0
    for row in rows:
        off = judge.off(row.text, row.position, row.logits)
        worst = max(worst, off)
        where = f"{row.place}, text {row.text}, position {row.position}"
        if not off <= judge.limit:
            wrong.append(f"{where}: logits off by {off:.4f}, allowed {judge.limit:.4f}")
        best = int(row.logits.argmax())
        if row.token != best:
            wrong.append(f"{where}: token {row.token} sampled, {best} has the largest logit")
        same += best == int(judge.exact[row.text][row.position].argmax())
    return {"rows": len(rows), "largest error": worst, "tokens as the reference's": f"{same} of {len(rows)}"}


def compared(eager: Sequence[Row], replayed: Sequence[Row], wrong: list[str]) -> str:
    """Whether a runtime that replays its decode steps gives the bits of one that does not."""
    same = replays = 0
    for a, b in zip(eager, replayed, strict=True):
        where = f"{b.place}, text {b.text}, position {b.position}"
        if torch.equal(a.logits, b.logits) and a.token == b.token:
            same += 1
        else:
            wrong.append(f"replay: {where}: off from eager by {float((a.logits - b.logits).abs().max()):.2g}")
        replays += b.execution == "graph"
        if b.decode != (b.execution == "graph"):
            wrong.append(f"replay: {where}: {b.execution}, {'a' if b.decode else 'no'} decode step")
    return f"{same} of {len(eager)} rows bit for bit as eager, {replays} of them replayed"


def seeded_tokens(runtime: Any, texts: Sequence[Sequence[int]], scale: Scale, wrong: list[str]) -> str:
    """Tokens drawn with seeds are those at which the running sum of the runtime's own probabilities passes the draw."""
    sequences = Sequences(texts, scale.blocks, BLOCK)
    plan, members = sequences.plan(list(scale.prompts))
    batch = seeded(list(scale.prompts))
    mass = torch.softmax(runtime.logits(plan).double().cpu(), -1).cumsum(-1)
    draws = uniform(batch.seeds, batch.positions)
    tokens = runtime.execute(plan, batch).result().token_ids
    exact = 0
    for row, token in enumerate(int(t) for t in tokens):
        low, high = (float(mass[row, token - 1]) if token else 0.0), float(mass[row, token])
        exact += low <= draws[row] < high
        if not low - 1e-4 <= draws[row] <= high + 1e-4:
            wrong.append(f"seeded: row {row}: token {token} holds {low:.5f}..{high:.5f}, drawn was {draws[row]:.5f}")
    return f"{exact} of {len(members)}"


# ---- whole requests --------------------------------------------------------------------------------------------------


def through_engine(runtime: Any, judge: Oracle, scale: Scale, wrong: list[str]) -> dict[str, Any]:
    """The same requests with one step in flight and with two."""
    outputs, preemptions = {}, {}
    for depth in (1, 2):
        outputs[depth], preemptions[depth] = generate(runtime, scale, depth)
    for depth, texts in outputs.items():
        for i, (start, output) in enumerate(texts):
            strays = judge.strays(start, output)
            if strays:
                wrong.append(f"engine, depth {depth}, request {i}: token {strays[0]} is not the reference's choice")
            if len(output) != scale.requests[i][1]:
                wrong.append(f"engine, depth {depth}, request {i}: {len(output)} tokens of {scale.requests[i][1]}")
    if not all(preemptions.values()):
        wrong.append(f"engine: no request was preempted ({preemptions}): the pool is too large to tell")
    same = sum(a == b for a, b in zip(outputs[1], outputs[2], strict=True))
    return {"requests alike at depth 1 and 2": f"{same} of {len(scale.requests)}", "preemptions": preemptions}


def generate(runtime: Any, scale: Scale, depth: int) -> tuple[list[tuple[list[int], list[int]]], int]:
    """((prompt, output) of every request, preemptions); requests come in while others run."""
    config = SchedulerConfig(max_num_seqs=scale.seqs, max_num_batched_tokens=scale.budget)
    runtime.steps_in_flight = depth
    engine = LLMEngine(runtime, config)
    vocab = scale.size.vocab
    prompts = [prompt(n, vocab, 50 if n == scale.requests[0][0] else 50 + i) for i, (n, _) in enumerate(scale.requests)]
    waiting = [
        Request(str(i), p, SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True))
        for i, (p, (_, wanted)) in enumerate(zip(prompts, scale.requests, strict=True))
    ]
    outputs: list[list[int]] = [[] for _ in waiting]
    while waiting or engine.has_unfinished():
        if waiting:
            engine.add_request(waiting.pop(0))
        for output in engine.step():
            outputs[int(output.request_id)] += output.new_token_ids
    return list(zip(prompts, outputs, strict=True)), engine.stats().num_preemptions
