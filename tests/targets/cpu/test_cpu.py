"""The native CPU runtime, through real engine folders, against transformers and the reference runtime."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import tiny_checkpoint
import torch
from cpu_engines import cpu_runtime
from family_models import CASES, MORE_CASES, VOCAB, family_model, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_stepping import greedy

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.config import BuildConfig
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime, SamplingBatch, SequenceSlice, StepPlan
from llmctl.targets.cpu.features import cpu_features
from llmctl.targets.cpu.runtime import CpuRuntime
from llmctl.targets.cpu.toolchain import VARIANTS, find_compiler, supported_variants
from llmctl.targets.reference.weights import checkpoint_runtime

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")

_FOLDERS: list[TemporaryDirectory[str]] = []


@cache
def exact_runtime(case: str, target: str = "cpu") -> CpuRuntime:
    """A family's float32 engine."""
    return cpu_runtime(family_model(case).checkpoint.path, target=target, dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_of_what_the_runtime_allocates(dtype: str, tmp_path: Path) -> None:
    """Heads of 12 columns lie in 16; activations are float32 in any engine."""
    model = family_model("llama_llama3").checkpoint.path
    config = BuildConfig(model=str(model), target="cpu", output=str(tmp_path / "engine"), dtype=dtype)
    engine = load_engine(build_engine(config), EngineRequest(kv_cache_bytes=4 << 20, max_num_seqs=8))
    runtime = open_runtime(engine, threads=1)
    assert isinstance(runtime, CpuRuntime)
    assert engine.graph.kv[0].head_dim == 12
    assert engine.plan.kv_bytes == runtime.kv_bytes
    assert 0.7 < engine.plan.activations / runtime.arena_bytes < 1.3


def tokens(length: int, seed: int, vocab: int = VOCAB) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


def scores_in_pieces(runtime: Runtime, sequences: list[list[int]], seed: int, largest: int) -> list[np.ndarray]:
    """log p(next token) at every position of every sequence, in random chunks over shuffled blocks, batched."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(min(runtime.limits.num_blocks, 64)).tolist()
    tables = [[order.pop() for _ in range(-(-len(s) // runtime.limits.block_size))] for s in sequences]
    done = [0] * len(sequences)
    found: list[list[np.ndarray]] = [[] for _ in sequences]
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        slices = []
        for i in rng.permutation(len(sequences)).tolist():
            take = min(int(rng.integers(0, largest + 1)), len(sequences[i]) - done[i])
            if take:
                piece, targets = sequences[i][done[i] : done[i] + take], sequences[i][done[i] + 1 : done[i] + take + 1]
                slices.append(SequenceSlice(str(i), piece, done[i], tables[i], False, targets))
                done[i] += take
        if slices:
            scores = runtime.execute(StepPlan(tuple(slices)), greedy(0)).result().scores
            for name, values in scores.items():
                found[int(name)].append(values.logprobs)
    return [np.concatenate(parts) for parts in found]


_FAST = ("gemma2", "qwen3_moe")


@pytest.mark.parametrize("case", [*CASES, *_FAST, *slow(case for case in MORE_CASES if case not in _FAST)])
def test_scores_equal_transformers(case: str) -> None:
    sequences = [tokens(n, seed) for seed, n in enumerate((40, 7, 23, 61))]
    expected = [
        torch.log_softmax(family_model(case).logits(s), -1)[:-1].gather(1, torch.tensor(s[1:])[:, None])[:, 0].numpy()
        for s in sequences
    ]
    for largest in (64, 9, 1):
        for e, f in zip(expected, scores_in_pieces(exact_runtime(case), sequences, 3, largest), strict=True):
            assert np.abs(e - f).max() < 2e-4


def generate(runtime: Runtime, prompt: list[int], steps: int, first_block: int = 0) -> list[int]:
    blocks = range(first_block, first_block + -(-(len(prompt) + steps) // runtime.limits.block_size))
    known, done = list(prompt), 0
    for _ in range(steps):
        plan = StepPlan((SequenceSlice("a", known[done:], done, blocks, True),))
        done = len(known)
        known.append(int(runtime.execute(plan, greedy(1)).result().token_ids[0]))
    return known[len(prompt) :]


@pytest.mark.parametrize("case", [*CASES, *slow(MORE_CASES)])
def test_greedy_tokens_equal_the_reference_runtime(case: str) -> None:
    reference = checkpoint_runtime(family_model(case).checkpoint, num_blocks=16)
    prompt = tokens(19, 7)
    assert generate(exact_runtime(case), prompt, 48) == generate(reference, prompt, 48)


@pytest.mark.parametrize("name", [v.name.rpartition("-")[2] for v in VARIANTS])
def test_every_variant_scores_alike(name: str) -> None:
    if name not in {v.name.rpartition("-")[2] for v in supported_variants(cpu_features())}:
        pytest.skip(f"this CPU does not run the {name} kernels")
    sequences = [tokens(n, seed, tiny_checkpoint.VOCAB) for seed, n in enumerate((50, 33))]
    for dtype, bound in (("float32", 2e-5), ("bfloat16", 2e-2)):
        for model in (_quantized(4, 32, False), _quantized(8, 64, True)):
            best = scores_in_pieces(_runtime_of(model, dtype, "cpu"), sequences, 0, 20)
            this = scores_in_pieces(_runtime_of(model, dtype, f"cpu:{name}"), sequences, 0, 20)
            assert max(np.abs(b - t).max() for b, t in zip(best, this, strict=True)) < bound


@cache
def _quantized(bits: int, group: int, symmetric: bool) -> Path:
    _FOLDERS.append(TemporaryDirectory())
    return tiny_checkpoint.write_gptq(
        Path(_FOLDERS[-1].name) / "model", bits=bits, group_size=group, symmetric=symmetric
    )


@cache
def _runtime_of(model: Path, dtype: str, target: str) -> CpuRuntime:
    return cpu_runtime(model, dtype=dtype, target=target)


SCHEMES = [(4, 32, False), (4, 64, True), (4, -1, True), (3, 32, True), (8, 32, False), (8, -1, True)]


@pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)
def test_quantized_scores_are_near_the_dequantized_ones(bits: int, group: int, symmetric: bool) -> None:
    """int8 activations cost little: next-token log-probabilities within a few hundredths on random weights."""
    model = _quantized(bits, group, symmetric)
    sequences = [tokens(n, seed, tiny_checkpoint.VOCAB) for seed, n in enumerate((60, 31))]
    exact = np.concatenate(scores_in_pieces(_runtime_of(model, "float32", "cpu"), sequences, 0, 64))
    integer = np.concatenate(scores_in_pieces(_runtime_of(model, "bfloat16", "cpu"), sequences, 0, 64))
    assert 0 < np.abs(exact - integer).mean() < 0.03
    assert float(np.std(exact)) > 0.05  # or the bound would say nothing


def logprob_rows(runtime: Runtime, slices: list[SequenceSlice]) -> dict[str, tuple[float, ...]]:
    batch = greedy(len(slices))
    every = SamplingBatch(
        batch.temperature, batch.seeds, batch.positions, num_logprobs=np.full(len(slices), VOCAB, np.int32)
    )
    result = runtime.execute(StepPlan(tuple(slices)), every).result()
    assert result.logprobs is not None
    rows = {}
    for piece, row in zip(slices, result.logprobs, strict=True):
        assert row is not None
        rows[piece.request_id] = tuple(v for _, v in sorted(zip(row.top_ids, row.top_logprobs, strict=True)))
    return rows


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_a_row_is_the_same_in_any_batch_and_chunking(lengths: list[int], cuts: list[int], dtype: str) -> None:
    """Bit for bit: the order of every sum depends on positions alone."""
    runtime = _runtime_of(_quantized(4, 32, False), dtype, "cpu")
    prompts = {str(i): tokens(n, i, tiny_checkpoint.VOCAB) for i, n in enumerate(lengths)}
    tables = {name: range(10 * int(name), 10 * int(name) + 10) for name in prompts}
    alone = {n: logprob_rows(runtime, [SequenceSlice(n, p, 0, tables[n], True)])[n] for n, p in prompts.items()}
    together: dict[str, tuple[float, ...]] = {}
    done = dict.fromkeys(prompts, 0)
    for step in range(200):
        pending = [n for n in prompts if done[n] < len(prompts[n])]
        if not pending:
            break
        slices = []
        for i, n in enumerate(pending):
            take = min(cuts[(step + i) % len(cuts)], len(prompts[n]) - done[n])
            slices.append(SequenceSlice(n, prompts[n][done[n] : done[n] + take], done[n], tables[n], True))
            done[n] += take
        rows = logprob_rows(runtime, slices)
        together |= {
            s.request_id: rows[s.request_id] for s in slices if done[s.request_id] == len(prompts[s.request_id])
        }
    assert together == alone


def test_long_contexts_are_split_among_threads_without_a_trace() -> None:
    """More than one attention segment: the split path (few items) and the whole path (many) give the same bits."""
    runtime = _runtime_of(_quantized(4, 32, False), "bfloat16", "cpu")
    prompt = tokens(470, 1, tiny_checkpoint.VOCAB)
    blocks = range(30)
    for begin in range(0, 469, 67):
        runtime.execute(
            StepPlan((SequenceSlice("a", prompt[begin : min(begin + 67, 469)], begin, blocks, False),)), greedy(0)
        )
    alone = logprob_rows(runtime, [SequenceSlice("a", prompt[469:], 469, blocks, True)])["a"]
    others = [SequenceSlice(str(i), [i + 3], 0, [40 + i], True) for i in range(7)]
    assert logprob_rows(runtime, [*others, SequenceSlice("a", prompt[469:], 469, blocks, True)])["a"] == alone


SAMPLING = [
    {},
    {"top_k": np.int32(5)},
    {"top_p": np.float32(0.7)},
    {"min_p": np.float32(0.1)},
    {"top_k": np.int32(40), "top_p": np.float32(0.9), "min_p": np.float32(0.02)},
]


@pytest.mark.parametrize("asked", SAMPLING, ids=lambda a: "+".join(a) or "temperature")
def test_sampling_equals_the_reference_sampler(asked: dict[str, np.generic]) -> None:
    """The same draws from (nearly) the same logits: all but the odd token on a rounding edge."""
    reference = checkpoint_runtime(family_model("llama").checkpoint, num_blocks=64)
    prompt, rows = tokens(12, 3), 8
    same = 0
    for trial in range(12):
        batch = SamplingBatch(
            np.full(rows, 0.8, np.float32),
            np.arange(rows, dtype=np.uint64) + 100 * trial,
            np.full(rows, 12, np.int64),
            **{name: np.full(rows, value) for name, value in asked.items()},  # type: ignore[arg-type]
        )
        plan = StepPlan(tuple(SequenceSlice(str(i), prompt, 0, [i], True) for i in range(rows)))
        mine, theirs = (r.execute(plan, batch).result().token_ids for r in (exact_runtime("llama"), reference))
        same += int((mine == theirs).sum())
    assert same >= 12 * rows - 2


def test_penalties_bias_mask_and_logprobs_equal_the_reference() -> None:
    reference = checkpoint_runtime(family_model("qwen2").checkpoint, num_blocks=64)
    rng = np.random.default_rng(0)
    rows = 4
    batch = SamplingBatch(
        np.zeros(rows, np.float32),
        np.zeros(rows, np.uint64),
        np.full(rows, 9, np.int64),
        repetition_penalty=np.array([1, 1.5, 2, 0.7], np.float32),
        presence_penalty=np.array([0, 0.5, -1, 2], np.float32),
        frequency_penalty=np.array([0, 0.3, 1, -0.5], np.float32),
        prompt_ids=tuple(rng.integers(0, VOCAB, 9).astype(np.int32) for _ in range(rows)),
        output_ids=tuple(rng.integers(0, VOCAB, n).astype(np.int32) for n in (0, 5, 20, 40)),
        bias_rows=np.array([3, 0, 0], np.int32),
        bias_ids=np.array([5, 7, 9], np.int32),
        bias_values=np.array([3.0, -np.inf, 50.0], np.float32),
        allowed_mask=rng.integers(0, 2**32, (rows, -(-VOCAB // 32)), dtype=np.uint32) | np.uint32(1 << 9),
        num_logprobs=np.array([-1, 0, 3, 20], np.int32),
    )
    plan = StepPlan(tuple(SequenceSlice(str(i), tokens(9, i), 0, [i], True) for i in range(rows)))
    mine, theirs = (r.execute(plan, batch).result() for r in (exact_runtime("qwen2"), reference))
    assert mine.token_ids.tolist() == theirs.token_ids.tolist()
    assert mine.logprobs is not None
    assert theirs.logprobs is not None
    for m, t in zip(mine.logprobs, theirs.logprobs, strict=True):
        if t is None or m is None:
            assert m is t
            continue
        assert (m.rank, m.top_ids) == (t.rank, t.top_ids)
        assert np.allclose((m.logprob, *m.top_logprobs), (t.logprob, *t.top_logprobs), atol=1e-4)


def test_act_order_columns_are_gathered(tmp_path: Path) -> None:
    model = tiny_checkpoint.write_gptq(tmp_path / "model", bits=4, group_size=32, act_order=True)
    sequences = [tokens(40, 0, tiny_checkpoint.VOCAB)]
    exact = scores_in_pieces(cpu_runtime(model, dtype="float32"), sequences, 0, 64)[0]
    integer = scores_in_pieces(cpu_runtime(model, dtype="bfloat16"), sequences, 0, 64)[0]
    assert np.abs(exact - integer).mean() < 0.03


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_does_not_matter(threads: int) -> None:
    model = _quantized(4, 32, False)
    sequences = [tokens(n, seed, tiny_checkpoint.VOCAB) for seed, n in enumerate((50, 33))]
    runtime = cpu_runtime(model, threads=threads)
    two = scores_in_pieces(_runtime_of(model, "auto", "cpu"), sequences, 0, 20)
    for a, b in zip(two, scores_in_pieces(runtime, sequences, 0, 20), strict=True):
        assert a.tolist() == b.tolist()
    runtime.close()


def test_threads_that_cannot_be_made_are_an_error_and_not_an_abort(tmp_path: Path) -> None:
    """Some of them are made before the limit is met, and must be gone again."""
    output = tmp_path / "engine"
    build_engine(BuildConfig(model=str(_quantized(4, 32, False)), target="cpu", output=str(output)))
    code = (
        "import resource, sys, threading, psutil\nfrom pathlib import Path\n"
        "from llmctl.artifact.loader import load_engine\nfrom llmctl.artifact.request import EngineRequest\n"
        "from llmctl.artifact.start import open_runtime\nfrom llmctl.errors import HostMemoryError\n"
        "engine = load_engine(Path(sys.argv[1]), EngineRequest(kv_cache_bytes=1 << 20))\n"
        "before, vms = psutil.Process().num_threads(), psutil.Process().memory_info().vms\n"
        "resource.setrlimit(resource.RLIMIT_AS, (vms + (200 << 20),) * 2)\n"
        "try:\n    open_runtime(engine, threads=100_000)\n"
        "except HostMemoryError as error:\n    print(error.message)\n"
        "assert psutil.Process().num_threads() == before\n"
        "open_runtime(engine, threads=2).close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("no memory or threads for a runtime of 100000 threads: Resource temporarily")


def test_a_cpu_engine_runs_without_torch(tmp_path: Path) -> None:
    output = tmp_path / "engine"
    build_engine(BuildConfig(model=str(_quantized(4, 32, False)), target="cpu", output=str(output)))
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\n"
        "from llmctl.artifact.loader import load_engine\nfrom llmctl.artifact.request import EngineRequest\n"
        "from llmctl.artifact.start import open_runtime\n"
        "from llmctl.engine.step import *\n"
        "runtime = open_runtime(load_engine(Path(sys.argv[1]), EngineRequest(kv_cache_bytes=1 << 20)))\n"
        "batch = SamplingBatch(np.zeros(1, np.float32), np.zeros(1, np.uint64), np.zeros(1, np.int64))\n"
        "runtime.execute(StepPlan((SequenceSlice('a', [1, 2], 0, [0], True),)), batch).result()\n"
        "heavy = {'torch', 'transformers', 'cupy'} & set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def completions(engine: LLMEngine, prompts: list[list[int]]) -> list[list[tuple[int, float]]]:
    """Greedy continuations, each token with its log-probability."""
    params = SamplingParams(temperature=0.0, max_tokens=10, logprobs=0, ignore_eos=True)
    found: dict[str, list[tuple[int, float]]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add_request(Request(str(i), prompt, params))
    while engine.has_unfinished():
        for output in engine.step():
            values = [entry.logprob for entry in output.logprobs or ()]
            found[output.request_id] += zip(output.new_token_ids, values, strict=True)
    return list(found.values())


_SYSTEM_PROMPTS = [tokens(48, 11, tiny_checkpoint.VOCAB), tokens(37, 12, tiny_checkpoint.VOCAB)]


@settings(max_examples=15, deadline=None)
@given(
    asked=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(0, 2)), min_size=1, max_size=8),
    budget=st.integers(8, 120),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_greedy_output_is_the_same_alone_and_with_batches_chunks_and_cached_prefixes(
    asked: list[tuple[int, int, int]], budget: int, dtype: str
) -> None:
    """Bit for bit. Alone, a prompt is computed whole and nothing is cached; together, prefixes of earlier requests are
    found in the cache, and prompts are cut to the budget."""
    runtime = _runtime_of(_quantized(4, 32, False), dtype, "cpu")
    prompts = [_SYSTEM_PROMPTS[system] + tokens(length, seed, tiny_checkpoint.VOCAB) for system, length, seed in asked]
    plain = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=512, enable_prefix_caching=False)
    alone = [completions(LLMEngine(runtime, plain), [prompt])[0] for prompt in prompts]
    engine = LLMEngine(runtime, SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=budget))
    assert completions(engine, prompts) == alone
    assert completions(engine, prompts) == alone
    assert all(len(row) == 10 for row in alone)
    assert engine.stats().prefix_cache_hits > 0
