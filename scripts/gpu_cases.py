"""What gpu_check.py measures: every kernel on shapes of real models, with the torch ops it is compared to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmctl.graph.code_books import CODE_BOOKS
from llmctl.graph.graph import Op
from llmctl.targets.cuda.call import Machine
from llmctl.targets.cuda.gemm import GEMM_ROWS
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.lora import lora_splits
from llmctl.targets.cuda.ops import EXECUTORS, Job, PackedWeight, Scratch, StepTensors
from llmctl.targets.cuda.signatures import launch
from llmctl.targets.reference import kernels as reference
from llmctl.targets.reference.kernels import AdapterWeights

BF16 = torch.bfloat16
ROTATE_BYTES = 256 * 2**20
"""Inputs rotate over at least this much: several times the largest L2."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
# name: (rows of q, k and v, hidden, rows of gate and up, heads, kv heads)
MODELS = {
    "Llama-3-8B": (6144, 4096, 28672, 32, 8),
    "Qwen3-4B": (6144, 2560, 19456, 32, 8),
    "Llama-3-70B/8": (1280, 8192, 7168, 8, 1),
}


@dataclass
class Prepared:
    """A case on a device. ``run(i)`` and the baselines use the i-th of ``copies`` sets of inputs; ``result`` is what
    the last run made, and ``expected(i)`` what it should have."""

    run: Callable[[int], None]
    copies: int
    result: Callable[[], Tensor] | None = None
    expected: Callable[[int], Tensor] | None = None
    baselines: dict[str, Callable[[int], Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row of the table: bytes moved and operations done by a launch, and how to make it."""

    kernel: str
    shape: str
    rows: int
    nbytes: int
    flops: int
    make: Callable[[Machine, str], Prepared]


def all_cases() -> Iterator[Case]:
    """The most telling first, for runs that are short of time."""
    for model in MODELS:
        yield from _linears(model, 4)
    yield from _decodes()
    yield from _prefills()
    yield from _rowwise()
    yield from _sampling()
    yield from _linears("Llama-3-8B", 8)
    yield from _linears("Llama-3-8B", 8, symmetric=True, book="fp8_e4m3")
    yield from _linears("Llama-3-8B", 4, group=64, symmetric=True, book="nf4")
    yield from _linears("Llama-3-8B", 4, group=32, minimum=True)  # Q4_K
    yield from _linears("Llama-3-8B", 8, group=16, symmetric=True)  # Q6_K
    yield from _int8_linears()
    yield from _adapters()


def copies_of(nbytes: int) -> int:
    """Sets of inputs to rotate over."""
    return max(1, min(64, -(-ROTATE_BYTES // max(nbytes, 1))))


def random(device: str, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, device=device, dtype=dtype)


# ---- linears -------------------------------------------------------------------------------------------------------


def _shapes(model: str) -> dict[str, tuple[int, int]]:
    qkv, hidden, gate_up, heads, _ = MODELS[model]
    return {
        "gate_up": (gate_up, hidden),
        "down": (hidden, gate_up // 2),
        "qkv": (qkv, hidden),
        "o": (hidden, heads * 128),
    }


def _linears(model: str, bits: int, **codes: Any) -> Iterator[Case]:
    """Integers with zeros in groups of 128, but for what ``codes`` say of a ``CudaFormat``."""
    for name, (n, k) in _shapes(model).items():
        fmt = CudaFormat(bits, (n, k), **{"group": 128, **codes})
        weight = n * k * bits // 8 + n * k // fmt.group_size * (4 if fmt.minimum else 2 if fmt.symmetric else 3)
        for m in ROWS:
            nbytes = weight + 2 * m * (n + k)
            yield Case(
                f"{fmt.kind}a16", f"{model} {name} {n}x{k}", m, nbytes, 2 * m * n * k, _linear_maker(fmt, m, weight)
            )


def random_planes(fmt: CudaFormat, device: str) -> PackedWeight:
    """A packed weight of random codes."""
    kinds = {"U8": torch.uint8, "F16": torch.float16}
    planes = {}
    for suffix, (dtype, shape) in fmt.planes().items():
        if suffix == "tile_book":
            planes[suffix] = torch.tensor(CODE_BOOKS[fmt.book].values, device=device)
        elif dtype == "F16":
            planes[suffix] = torch.rand(shape, device=device, dtype=kinds[dtype]) * 0.004 + 0.001
        else:
            top = 2**fmt.bits if suffix != "tiles" else 256 if fmt.kind != "fp8" else 0x7F  # float8's NaN
            planes[suffix] = torch.randint(0, top, shape, device=device, dtype=kinds[dtype])
    return PackedWeight(fmt, planes)


def step_tensors(device: str, scratch: Scratch, **fields: Any) -> StepTensors:
    """What the ops of a step share, and no more of it than ``fields``."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    sms = torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 132
    base: dict[str, Any] = {
        "positions": none, "slots": none, "rows": none, "block_tables": none, "seq_lens": none, "query_start": none,
        "longest": 0, "most_rows": 1, "fewest_rows": 1, "caches": {}, "rope": lambda _: (none, none),
    }  # fmt: skip
    return StepTensors(**(base | fields), scratch=scratch, sms=sms)


def _linear_maker(fmt: CudaFormat, m: int, weight_bytes: int) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        n, k = fmt.shape
        count = copies_of(weight_bytes)
        weights = [random_planes(fmt, device) for _ in range(count)]
        x, y = random(device, m, k), torch.empty(m, n, device=device, dtype=BF16)
        step = step_tensors(device, Scratch(device))
        op = Op("linear", "linear", ("x",), ("y",), ("w", ""))

        def run(i: int) -> None:
            EXECUTORS[f"{fmt.kind}a16"](machine, Job(op, [x], [y], [weights[i], None], step))

        dense_count = copies_of(2 * n * k)
        dense = [random(device, n, k) for _ in range(dense_count)]
        baselines: dict[str, Callable[[int], Any]] = {"cuBLAS bf16": lambda i: torch.mm(x, dense[i % dense_count].T)}
        if fmt.bits == 4 and device == "cuda" and m <= GEMM_ROWS:
            baselines |= _int4(x, n, k, count)
        return Prepared(run, count, lambda: y, lambda i: _product(machine, weights[i], x), baselines)

    return make


def _product(machine: Machine, weight: PackedWeight, x: Tensor) -> Tensor:
    """The product in float32 of weights dequantised by their kernel, which tests/gpu hold to the reference."""
    from llmctl.targets.cuda.gemm_signatures import dequantize_call

    w = torch.empty(weight.format.shape, device=x.device, dtype=BF16)
    machine.launch(dequantize_call(weight.format, "bf16", weight.planes, w))
    return x.float() @ w.float().T


def _int4(x: Tensor, n: int, k: int, count: int) -> dict[str, Callable[[int], Any]]:
    """torch's own 4-bit product, where this torch has it for CUDA."""
    try:
        packed = [
            torch.ops.aten._convert_weight_to_int4pack(
                torch.randint(0, 256, (n, k // 2), device=x.device, dtype=torch.uint8), 8
            )
            for _ in range(count)
        ]
        scales = random(str(x.device), k // 128, n, 2)
        torch.ops.aten._weight_int4pack_mm(x, packed[0], 128, scales)
    except (RuntimeError, AttributeError, NotImplementedError):
        return {}
    return {"torch int4": lambda i: torch.ops.aten._weight_int4pack_mm(x, packed[i], 128, scales)}


def _int8_linears() -> Iterator[Case]:
    for name, (n, k) in _shapes("Llama-3-8B").items():
        fmt = CudaFormat(8, (n, k), symmetric=True)
        for m in ROWS:
            nbytes = n * k + m * (k + 2 * n)
            yield Case("w8a8", f"Llama-3-8B {name} {n}x{k}", m, nbytes, 2 * m * n * k, _int8_maker(fmt, m))


def _int8_maker(fmt: CudaFormat, m: int) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        n, k = fmt.shape
        count, step = copies_of(n * k), step_tensors(device, Scratch(device))
        weights = [random_planes(fmt, device) for _ in range(count)]
        x = torch.randint(-127, 128, (m, k), device=device, dtype=torch.int8)
        scales, y = torch.rand(m, 1, device=device) * 0.02, torch.empty(m, n, device=device, dtype=BF16)
        op = Op("linear", "linear", ("q", "scale"), ("y",), ("w", ""), {"activations": "int8"})

        def run(i: int) -> None:
            EXECUTORS["w8a8"](machine, Job(op, [x, scales], [y], [weights[i], None], step))

        wide, dense_count = random(device, m, k), copies_of(2 * n * k)
        dense = [random(device, n, k) for _ in range(dense_count)]
        baselines = {"cuBLAS bf16": lambda i: torch.mm(wide, dense[i % dense_count].T)}
        return Prepared(run, count, lambda: y, lambda i: _product(machine, weights[i], x.float() * scales), baselines)

    return make


def _adapters() -> Iterator[Case]:
    """The qkv and down projections of a Llama-3-8B: a decode batch with an adapter each four, and a prompt with one."""
    for name, n, k in (("qkv", 6144, 4096), ("down", 4096, 14336)):
        for rows, adapters in ((1, 1), (32, 8), (128, 32), (4096, 1)):
            for rank in (16, 64):
                weights = 2 * adapters * rank * (n + k)
                between = 2 * 4 * rows * rank * lora_splits(k)
                nbytes = weights + 2 * rows * (k + 2 * n) + between
                shape = f"Llama-3-8B {name} {n}x{k}, rank {rank}, {adapters} adapters"
                yield Case("lora", shape, rows, nbytes, 2 * rows * rank * (n + k),
                           _adapter_maker(n, k, rows, adapters, rank))  # fmt: skip


def _adapter_maker(n: int, k: int, rows: int, adapters: int, rank: int) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        count = copies_of(2 * (adapters * rank * (n + k) + rows * (k + n)))
        weights = [
            AdapterWeights(random(device, adapters, rank, k) * k**-0.5, random(device, adapters, n, rank),
                           torch.rand(adapters, device=device))
            for _ in range(count)
        ]  # fmt: skip
        x = [random(device, rows, k) for _ in range(count)]
        y, z = random(device, rows, n), [torch.empty(rows, n, device=device, dtype=BF16) for _ in range(count)]
        chosen = (torch.arange(rows, device=device) % adapters).int()
        steps = [step_tensors(device, Scratch(device), adapters=chosen, lora={"lora": w}) for w in weights]
        op = Op("lora", "lora", ("x", "y"), ("z",), (), {"column": 0, "rows": n, "rank": rank})
        last = [0]

        def run(i: int) -> None:
            # In place, as a runtime has it: what is added to is then whatever the run before left.
            EXECUTORS["lora"](machine, Job(op, [x[i], z[i]], [z[i]], [], steps[i]))
            last[0] = i

        def first() -> Tensor:
            z[last[0]].copy_(y)
            run(last[0])
            return z[last[0]]

        def expected(i: int) -> Tensor:
            wide = AdapterWeights(weights[i].a.float(), weights[i].b.float(), weights[i].scales)
            return reference.lora(x[i].float(), y.float(), chosen, wide)

        return Prepared(run, count, first, expected)

    return make


# ---- attention -----------------------------------------------------------------------------------------------------


def _decodes() -> Iterator[Case]:
    for model in ("Llama-3-8B", "Llama-3-70B/8"):
        *_, heads, kv_heads = MODELS[model]
        for batch in (1, 8, 32, 128):
            for context in (512, 2048, 8192, 32768):
                if batch * context > 2**20:
                    continue
                for kv in (BF16, torch.int8, torch.float8_e4m3fn) if (batch, context) == (32, 8192) else (BF16,):
                    yield _attention_case(model, "decode", batch, context, 1, heads, kv_heads, kv)


def _prefills() -> Iterator[Case]:
    for model in ("Llama-3-8B", "Llama-3-70B/8"):
        *_, heads, kv_heads = MODELS[model]
        for context, rows in ((512, 512), (2048, 2048), (8192, 8192), (32768, 32768), (8192, 512), (32768, 2048)):
            yield _attention_case(model, "prefill", 1, context, rows, heads, kv_heads, BF16)


def _attention_case(
    model: str, what: str, batch: int, context: int, rows: int, heads: int, kv_heads: int, kv: torch.dtype
) -> Case:
    size = torch.empty(0, dtype=kv).element_size()
    stored = batch * context * kv_heads * (2 * 128 * size + (8 if kv == torch.int8 else 0))
    nbytes = stored + 2 * batch * rows * heads * 128 * 2
    pairs = batch * (rows * context - rows * (rows - 1) // 2)
    kind = str(kv).removeprefix("torch.")
    label = f"{model} {heads}/{kv_heads} heads, {batch} x {context}, {kind}" + (
        "" if rows == context or rows == 1 else f", last {rows}"
    )
    maker = _attention_maker(batch, context, rows, heads, kv_heads, kv, stored)
    return Case(f"attention {what}", label, batch * rows, nbytes, 4 * pairs * heads * 128, maker)


def _attention_maker(
    batch: int, context: int, rows: int, heads: int, kv_heads: int, kv: torch.dtype, stored: int
) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        blocks, count = batch * context // 16, min(16, copies_of(stored))
        caches = [
            random(device, 2, blocks, 16, kv_heads, 128).clamp(-4, 4).to(kv) if kv.is_floating_point
            else torch.randint(-127, 128, (2, blocks, 16, kv_heads, 128), device=device, dtype=kv)
            for _ in range(count)
        ]  # fmt: skip
        tables = torch.randperm(blocks, device=device).int().view(batch, -1)
        one_group = tables.unsqueeze(1)
        lens = torch.full((batch,), context, dtype=torch.int32, device=device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * rows
        q, out = (
            random(device, batch * rows, heads * 128),
            torch.empty(batch * rows, heads * 128, device=device, dtype=BF16),
        )
        scales = torch.rand(2, blocks * 16, kv_heads, device=device) * 0.02 if kv == torch.int8 else None
        attrs = {"layer": 0, "heads": heads, "kv_heads": kv_heads, "head_dim": 128, "scale": 128**-0.5, "window": 0,
                 "softcap": 0.0}  # fmt: skip
        step = step_tensors(
            device, Scratch(device), block_tables=one_group, seq_lens=lens, query_start=starts, longest=context,
            most_rows=rows, fewest_rows=rows, kv_scales={} if scales is None else {0: scales},
        )  # fmt: skip
        op = Op("attention", "attention", ("q",), ("o",), (), attrs)

        def run(i: int) -> None:
            step.caches = {0: caches[i]}
            EXECUTORS["paged_attention"](machine, Job(op, [q], [out], [], step))

        def expected(i: int) -> Tensor:
            k, v = (part[tables.long()].reshape(batch, context, kv_heads, 128).transpose(1, 2) for part in caches[i])
            query = q.view(batch, rows, heads, 128).transpose(1, 2)
            return _sdpa(query, k, v, rows).transpose(1, 2).reshape(out.shape).float()

        plain_count = min(16, copies_of(2 * batch * context * kv_heads * 256))
        plain = [random(device, 2, batch, kv_heads, context, 128) for _ in range(plain_count)]
        query = q.view(batch, rows, heads, 128).transpose(1, 2)
        causal = {"torch SDPA": lambda i: _sdpa(query, *plain[i % plain_count], rows)} if rows in (1, context) else {}
        # The whole score matrix of a long prompt behind a prefix would not fit where flash attention is not to be had.
        checkable = kv == BF16 and rows in (1, context) and context <= 8192
        return Prepared(run, count, (lambda: out) if checkable else None, expected if checkable else None, causal)

    return make


def _sdpa(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """torch's flash attention, or what it has where that cannot be; never cuDNN's."""
    gqa = q.shape[1] != k.shape[1]
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=rows > 1, enable_gqa=gqa)


# ---- rowwise -------------------------------------------------------------------------------------------------------


def _rowwise() -> Iterator[Case]:
    for rows in (1, 32, 512, 4096):
        for hidden in (4096, 8192):
            item = rows * hidden * 2
            yield Case("rms_norm", f"{hidden}", rows, 2 * item, 0, _norm_maker(rows, hidden, add=False))
            yield Case("add_rms_norm", f"{hidden}", rows, 4 * item, 0, _norm_maker(rows, hidden, add=True))
            int8 = 3 * item + rows * (hidden + 4)
            yield Case("add_rms_norm_s8", f"{hidden}", rows, int8, 0, _int8_norm_maker(rows, hidden))
        yield Case("silu_mul", "14336", rows, 3 * rows * 14336 * 2, 0, _gated_maker(rows, 14336))
        yield Case("rope_kv", "Llama-3-8B 32/8 heads", rows, 2 * rows * 48 * 256, 0, _rope_maker(rows, 32, 8))


def _norm_maker(rows: int, hidden: int, add: bool) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        count = copies_of(rows * hidden * (8 if add else 4))
        sets = [random(device, 4, rows, hidden) for _ in range(count)]
        w, last = random(device, hidden), [0]

        def run(i: int) -> None:
            x, residual, y, total = sets[i]
            extra = {"residual": residual, "sum": total} if add else {}
            name = "add_rms_norm_bf16" if add else "rms_norm_bf16"
            launch(machine, name, x=x, w=w, y=y, eps=1e-5, plus_one=0, **extra)
            last[0] = i

        def plain(i: int) -> Tensor:
            x, residual, *_ = sets[i]
            return F.rms_norm(x + residual if add else x, (hidden,), w, 1e-5)

        def expected(i: int) -> Tensor:
            x, residual, *_ = sets[i]
            return reference.rms_norm((x + residual if add else x).float(), w, 1e-5)

        return Prepared(run, count, lambda: sets[last[0]][2], expected, {"torch": plain})

    return make


def _int8_norm_maker(rows: int, hidden: int) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        count = copies_of(rows * hidden * 7)
        sets = [random(device, 3, rows, hidden) for _ in range(count)]
        q = [torch.empty(rows, hidden, device=device, dtype=torch.int8) for _ in range(count)]
        w, scales, last = random(device, hidden), torch.empty(rows, device=device), [0]

        def run(i: int) -> None:
            x, residual, total = sets[i]
            launch(machine, "add_rms_norm_s8_bf16", x=x, residual=residual, sum=total, w=w, q=q[i], scales=scales,
                   eps=1e-5, plus_one=0)  # fmt: skip
            last[0] = i

        def expected(i: int) -> Tensor:
            x, residual, _ = sets[i]
            return reference.rms_norm((x + residual).float(), w, 1e-5)

        return Prepared(run, count, lambda: reference.dequantize_rows(q[last[0]], scales[:, None]), expected)

    return make


def _gated_maker(rows: int, width: int) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        count = copies_of(rows * width * 6)
        x = [random(device, rows, 2 * width) for _ in range(count)]
        y = [torch.empty(rows, width, device=device, dtype=BF16) for _ in range(count)]
        last = [0]

        def run(i: int) -> None:
            launch(machine, "silu_mul_bf16", x=x[i], y=y[i])
            last[0] = i

        def plain(i: int) -> Tensor:
            gate, up = x[i].chunk(2, -1)
            return F.silu(gate) * up

        return Prepared(
            run,
            count,
            lambda: y[last[0]],
            lambda i: F.silu(x[i][:, :width].float()) * x[i][:, width:].float(),
            {"torch": plain},
        )

    return make


def _rope_maker(rows: int, heads: int, kv_heads: int) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        width = (heads + 2 * kv_heads) * 128
        count = copies_of(4 * rows * width)
        sets = [random(device, rows, width) for _ in range(count)]
        caches = [torch.zeros(2, rows, kv_heads, 128, device=device, dtype=BF16) for _ in range(count)]
        cos, sin = torch.rand(2, 8192, 64, device=device, dtype=torch.float32)
        positions, slots = torch.randint(0, 8192, (rows,), device=device), torch.randperm(rows, device=device)

        def run(i: int) -> None:
            q, k, v = sets[i].split([heads * 128, kv_heads * 128, kv_heads * 128], 1)
            launch(machine, "rope_kv_bf16_bf16", q=q, k=k, v=v, q_out=q, positions=positions, cosines=cos, sines=sin,
                   slots=slots, keys=caches[i][0], values=caches[i][1], heads=heads, kv_heads=kv_heads, head_dim=128,
                   rotary_dim=128, gptj=0, key_scale=1.0, value_scale=1.0)  # fmt: skip

        return Prepared(run, count)

    return make


def _sampling() -> Iterator[Case]:
    vocab = 128256
    for rows in (1, 32, 256):
        for name, filters in (("greedy", {}), ("temperature", {}), ("top-p 0.9", {"top_p": 0.9})):
            nbytes = rows * vocab * 4
            yield Case("sample", f"{vocab}, {name}", rows, nbytes, 0, _sample_maker(rows, vocab, name, filters))


def _sample_maker(rows: int, vocab: int, name: str, filters: dict[str, float]) -> Callable[[Machine, str], Prepared]:
    def make(machine: Machine, device: str) -> Prepared:
        count = copies_of(rows * vocab * 4)
        logits = [random(device, rows, vocab, dtype=torch.float32) * 3 for _ in range(count)]
        tokens = torch.empty(rows, dtype=torch.int32, device=device)
        temperature = torch.full((rows,), 0.0 if name == "greedy" else 1.0, device=device)
        limits = {key: torch.full((rows,), value, device=device) for key, value in filters.items()}
        seeds = torch.arange(rows, device=device)

        def run(i: int) -> None:
            launch(machine, "sample_f32", logits=logits[i], temperature=temperature, seeds=seeds, positions=seeds,
                   tokens=tokens, **limits)  # fmt: skip

        if name == "greedy":
            return Prepared(
                run, count, lambda: tokens, lambda i: logits[i].argmax(-1), {"torch": lambda i: logits[i].argmax(-1)}
            )
        return Prepared(run, count)

    return make


def nothing_lost(found: Tensor, exact: Tensor) -> float:
    """Largest error over the largest value; infinite when the result is not finite."""
    if not torch.isfinite(found.float()).all():
        return math.inf
    return ((found.float() - exact.float()).abs().max() / exact.float().abs().max().clamp(min=1e-6)).item()
