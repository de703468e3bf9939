"""What executes a graph's op on CUDA kernels: by the registry's kernel name, the launches that make its outputs.

An executor gets the op, tensors for its inputs and outputs, its weights, and what the step's ops share. It launches
through a ``Machine`` (a GPU, or the emulator in tests) and allocates only from the step's ``Scratch``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmctl.graph.dtypes import BY_TAG, HALF_DTYPES
from llmctl.graph.graph import Op
from llmctl.graph.ops import OP_KINDS
from llmctl.targets.cuda.attention import DECODE_SPLIT, AttentionShape, max_splits
from llmctl.targets.cuda.attention_signatures import planned
from llmctl.targets.cuda.call import Machine
from llmctl.targets.cuda.experts import plan_grouped
from llmctl.targets.cuda.experts_signatures import grouped_call
from llmctl.targets.cuda.gemm import GEMM_ROWS, GemmPlan, plan_gemm, plan_tile
from llmctl.targets.cuda.gemm_signatures import dequantize_call, gemm_call
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.lora import lora_splits
from llmctl.targets.cuda.lora_signatures import add_adapters
from llmctl.targets.cuda.registry import quantizer
from llmctl.targets.cuda.signatures import launch
from llmctl.targets.reference.kernels import AdapterWeights

_DTYPE = {getattr(torch, row.torch): row for row in BY_TAG.values()}


class Scratch:
    """Buffers by purpose, kept and grown until they are frozen: a captured CUDA graph holds on to their addresses."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._frozen = False

    def take(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """A buffer of a shape; zeros when new, and whatever its last user left in it afterwards.

        Raises:
            RuntimeError: larger than what was reserved before ``freeze``.
        """
        size = torch.Size(shape).numel()
        key = (name, dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            if self._frozen and size:
                raise RuntimeError(f"scratch '{name}': {size} elements of {dtype} were not reserved")
            self._buffers[key] = torch.zeros(size, dtype=dtype, device=self._device)
        return self._buffers[key][:size].view(shape)

    def freeze(self) -> None:
        """Nothing grows from now on."""
        self._frozen = True


@dataclass(frozen=True)
class PackedWeight:
    """One weight of codes on the device, packed: its planes by suffix, as ``format.planes()`` names them."""

    format: CudaFormat
    planes: dict[str, Tensor]


@dataclass
class StepTensors:
    """What the ops of one step share.

    Attributes:
        positions: i64 [T]. slots: i64 [groups, T]. rows: i64 [R], whose logits are wanted.
        block_tables: i32 [S, groups, blocks]. seq_lens: i32 [S]. query_start: i32 [S + 1].
        longest: largest of seq_lens. most_rows: most rows of a sequence. fewest_rows: fewest.
        caches: [2, blocks, block size, kv heads, head dim] by layer. rope: cos and sin f32 [positions, R / 2] of an op.
        sms: multiprocessors of the device. kv_scales: f32 [2, slots, kv heads] by layer, of int8 caches.
        adapters: i32 [T], each token's LoRA adapter, -1 for none; None: no token has one. lora: their weights by op.
        group_of: the KV group of each layer; empty: there is one.
        sorted_slots: what scratch holds of a mixture's slots by expert: whose choices, sorted by which kernel, blocks.
    """

    positions: Tensor
    slots: Tensor
    rows: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    query_start: Tensor
    longest: int
    most_rows: int
    fewest_rows: int
    caches: Mapping[int, Tensor]
    rope: Callable[[Op], tuple[Tensor, Tensor]]
    scratch: Scratch
    sms: int = 132
    kv_scales: Mapping[int, Tensor] = field(default_factory=dict)
    adapters: Tensor | None = None
    lora: Mapping[str, AdapterWeights] = field(default_factory=dict)
    group_of: Sequence[int] = ()
    sorted_slots: tuple[str, str, int] | None = None

    def slots_of(self, layer: int) -> Tensor:
        """i64 [T], where a layer stores the step's keys and values."""
        return self.slots[self._group(layer)]

    def tables_of(self, layer: int) -> Tensor:
        """i32 [S, blocks], a layer's block tables."""
        return self.block_tables[:, self._group(layer)]

    def _group(self, layer: int) -> int:
        return self.group_of[layer] if self.group_of else 0

    def cache_scales(self, layer: int) -> dict[str, Tensor]:
        """``key_scales`` and ``value_scales`` of an int8 cache; nothing for others."""
        return dict(zip(("key_scales", "value_scales"), self.kv_scales.get(layer, ()), strict=False))


@dataclass(frozen=True)
class Job:
    """One op to execute. ``outputs``: one, merged, of a linear with splits; ``weights``: None where absent."""

    op: Op
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    weights: Sequence[Tensor | PackedWeight | None]
    step: StepTensors

    @property
    def attrs(self) -> Mapping[str, Any]:
        """Of the op."""
        return self.op.attrs

    @property
    def tag(self) -> str:
        """Of the activations that are not int8."""
        tensors = (*self.outputs, *self.inputs)
        return next(_DTYPE[t.dtype].tag for t in tensors if _DTYPE[t.dtype].name in HALF_DTYPES)


Executor = Callable[[Machine, Job], None]


def _embed(machine: Machine, job: Job) -> None:
    gather = job.op.kind == "gather_rows"
    ids, table = (job.step.rows, job.inputs[0]) if gather else (job.inputs[0], job.weights[0])
    scale = job.attrs.get("scale", 1.0)
    launch(machine, f"embed_{job.tag}", ids=ids, w=table, y=job.outputs[0], scale=scale)


def _pos_embed(machine: Machine, job: Job) -> None:
    x, positions = job.inputs
    launch(machine, f"pos_embed_{job.tag}", x=x, positions=positions, w=job.weights[0], z=job.outputs[0],
           offset=job.attrs["offset"])  # fmt: skip


def _norm(machine: Machine, job: Job) -> None:
    kind = OP_KINDS[job.op.kind]
    special: dict[str, Any] = {"b": job.weights[1]} if "b" in kind.weights else {"plus_one": int(job.attrs["plus_one"])}
    added = {"residual": job.inputs[1], "sum": job.outputs[-1]} if "residual" in kind.inputs else {}
    made = _int8_rows(job) if kind.int8_rows else {"y": job.outputs[0]}
    x = job.inputs[0]
    x = x if x.is_contiguous() else _gathered(machine, job, "normed", x)  # a slice of a merged linear
    launch(machine, f"{job.op.kind}_{job.tag}", x=x, w=job.weights[0], eps=job.attrs["eps"], **made, **special,
           **added)  # fmt: skip


def _int8_rows(job: Job) -> dict[str, Tensor]:
    return {"q": job.outputs[0], "scales": job.outputs[1][:, 0]}


def _quantize(machine: Machine, job: Job) -> None:
    launch(machine, f"{quantizer(job.op)}_{job.tag}", x=job.inputs[0], **_int8_rows(job))


def _head_norm(machine: Machine, job: Job) -> None:
    heads = job.inputs[0].shape[1] // job.attrs["head_dim"]
    launch(machine, f"head_rms_norm_{job.tag}", x=job.inputs[0], w=job.weights[0], y=job.outputs[0], heads=heads,
           eps=job.attrs["eps"], plus_one=int(job.attrs.get("plus_one", False)))  # fmt: skip


def _elementwise(machine: Machine, job: Job) -> None:
    # Slices of a merged linear whose epilogue was not fused have gaps between their rows.
    x = [t if t.is_contiguous() else _gathered(machine, job, f"elementwise{i}", t) for i, t in enumerate(job.inputs)]
    if job.op.kind == "act":
        launch(machine, f"act_{job.attrs['fn']}_{job.tag}", x=x[0], y=job.outputs[0])
    elif job.op.kind == "act_mul":
        launch(machine, f"{job.attrs['fn']}_mul_{job.tag}", x=x[0], y=job.outputs[0])
    else:
        launch(machine, f"{job.op.kind}_{job.tag}", x=x[0], y=x[1], z=job.outputs[0])


def _gathered(machine: Machine, job: Job, name: str, x: Tensor) -> Tensor:
    close = job.step.scratch.take(name, x.dtype, *x.shape)
    machine.call_torch(close.copy_, x)
    return close


def _rope_kv(machine: Machine, job: Job) -> None:
    numbers: dict[str, Any] = {"head_dim": job.attrs.get("head_dim", 0), "gptj": int(job.attrs.get("style") == "gptj"),
               "rotary_dim": job.attrs.get("rotary_dim", 0), "key_scale": 1.0, "value_scale": 1.0}  # fmt: skip
    rotation: dict[str, Any] = {}
    if numbers["rotary_dim"]:
        cos, sin = job.step.rope(job.op)
        rotation = {"positions": job.step.positions, "cosines": cos, "sines": sin}
    if job.op.kind == "rope":
        for x, y in zip(job.inputs, job.outputs, strict=False):
            heads = x.shape[1] // numbers["head_dim"]
            launch(
                machine, f"rope_kv_{job.tag}_{job.tag}", q=x, q_out=y, heads=heads, kv_heads=0, **rotation, **numbers
            )
        return
    keys, values = (part.flatten(0, 1) for part in job.step.caches[job.attrs["layer"]])
    numbers["head_dim"] = keys.shape[2]
    store = {"slots": job.step.slots_of(job.attrs["layer"]), "keys": keys, "values": values, "kv_heads": keys.shape[1]}
    store |= job.step.cache_scales(job.attrs["layer"])
    tag = f"{_DTYPE[job.inputs[0].dtype].tag}_{_DTYPE[keys.dtype].tag}"
    if job.op.kind == "kv_write":
        launch(machine, f"rope_kv_{tag}", k=job.inputs[0], v=job.inputs[1], heads=0, **store, **numbers)
        return
    q, k, v = job.inputs[:3]
    launch(machine, f"rope_kv_{tag}", q=q, k=k, v=v, q_out=job.outputs[0], heads=job.attrs["heads"], **store,
           **rotation, **numbers)  # fmt: skip


def _gemm(machine: Machine, job: Job) -> None:
    x, weight, scratch = job.inputs[0], job.weights[0], job.step.scratch
    assert isinstance(weight, PackedWeight)
    fmt = weight.format
    if fmt.permuted:
        ordered = scratch.take("permuted", x.dtype, *x.shape)
        launch(machine, f"permute_columns_{job.tag}", x=x, permutation=weight.planes["permutation"], y=ordered)
        x = ordered
    if len(x) > GEMM_ROWS:
        dense = scratch.take("dense", x.dtype, *fmt.shape)
        machine.launch(dequantize_call(fmt, job.tag, weight.planes, dense))
        _dense(machine, job, x, dense)
        return
    _launch_gemm(machine, job, plan_gemm(fmt, _DTYPE[x.dtype].name, len(x), job.step.sms), x=x)


def _gemm_int8(machine: Machine, job: Job) -> None:
    (q, scales), y, weight = job.inputs[:2], job.outputs[0], job.weights[0]
    assert isinstance(weight, PackedWeight)
    plan = plan_tile(weight.format, _DTYPE[y.dtype].name, len(q), int8=True, sms=job.step.sms)
    _launch_gemm(machine, job, plan, x=q, token_scales=scales[:, 0])


def _launch_gemm(machine: Machine, job: Job, plan: GemmPlan, **x: Tensor) -> None:
    weight, scratch = job.weights[0], job.step.scratch
    assert isinstance(weight, PackedWeight)
    machine.launch(
        gemm_call(
            plan, weight.format, weight.planes, epilogue=job.attrs.get("epilogue", ""),
            workspace=scratch.take("workspace", torch.float32, plan.workspace),
            counters=scratch.take("counters", torch.int32, plan.counters),
            y=job.outputs[0], bias=job.weights[1], residual=_residual(job), **x,
        )
    )  # fmt: skip


def _capped(execute: Executor) -> Executor:
    """A linear, then what its result is scaled and capped by: torch's operators, in place; of logits alone."""

    def run(machine: Machine, job: Job) -> None:
        execute(machine, job)
        y, scale, softcap = job.outputs[0], job.attrs.get("scale", 1.0), job.attrs.get("softcap", 0.0)
        factor = scale / softcap if softcap else scale
        if factor != 1.0:
            machine.call_torch(y.mul_, factor)
        if softcap:
            machine.call_torch(y.tanh_)
            machine.call_torch(y.mul_, softcap)

    return run


def _residual(job: Job) -> Tensor | None:
    return job.inputs[-1] if "residual" in job.attrs else None


@_capped
def dense(machine: Machine, job: Job) -> None:
    """A linear of a dense weight: torch's product (cuBLAS), into the output."""
    weight = job.weights[0]
    assert isinstance(weight, Tensor)
    _dense(machine, job, job.inputs[0], weight)


def _dense(machine: Machine, job: Job, x: Tensor, weight: Tensor) -> None:
    """torch's product, then the gated activation or the residual if there is one."""
    bias, epilogue, residual, y = job.weights[1], job.attrs.get("epilogue"), _residual(job), job.outputs[0]
    if epilogue:
        y = job.step.scratch.take("product", x.dtype, len(x), len(weight))
    if bias is not None:
        machine.call_torch(torch.addmm, bias, x, weight.t(), out=y)
    elif residual is not None:
        machine.call_torch(torch.addmm, residual, x, weight.t(), out=y)
        return
    else:
        machine.call_torch(torch.mm, x, weight.t(), out=y)
    if epilogue:
        launch(machine, f"{epilogue}_{job.tag}", x=y, y=job.outputs[0])
    elif residual is not None:
        machine.call_torch(torch.add, y, residual, out=y)


def _lora(machine: Machine, job: Job) -> None:
    """The result may lie where the input that it adds to does; nothing is copied then."""
    (x, y), z, step = job.inputs, job.outputs[0], job.step
    if z.data_ptr() != y.data_ptr():
        machine.call_torch(z.copy_, y)
    if step.adapters is None:
        return
    weights = step.lora[job.op.name]
    h = step.scratch.take("lora", torch.float32, lora_splits(x.shape[1]), len(x), weights.a.shape[1])
    columns = slice(job.attrs["column"], job.attrs["column"] + job.attrs["rows"])
    add_adapters(machine, job.tag, x=x, y=z[:, columns], h=h, a=weights.a, b=weights.b, scales=weights.scales,
                 adapters=step.adapters)  # fmt: skip


def _attention(machine: Machine, job: Job) -> None:
    step, (q,), (out,) = job.step, job.inputs, job.outputs
    cache = step.caches[job.attrs["layer"]]
    keys, values = (part.flatten(0, 1) for part in cache)
    heads, window = job.attrs["heads"], job.attrs["window"]
    shape = AttentionShape(job.tag, _DTYPE[cache.dtype].tag, heads, cache.shape[3], cache.shape[4], cache.shape[2])
    sequences = len(step.seq_lens)
    shared = {
        "q": q, "keys": keys, "values": values, "block_tables": step.tables_of(job.attrs["layer"]),
        "seq_lens": step.seq_lens, "heads": heads, "block_size": shape.block_size, "window": window,
        "scale": job.attrs["scale"], "softcap": job.attrs["softcap"], "key_scale": 1.0, "value_scale": 1.0,
        **step.cache_scales(job.attrs["layer"]),
    }  # fmt: skip
    if step.most_rows > 1:
        plan = shape.prefill(sequences, len(q))
        launch(machine, plan.entry, planned(plan), query_start=step.query_start, out=out, min_rows=2, **shared)
    if step.fewest_rows == 1:
        starts = step.query_start if step.most_rows > 1 else None
        splits = max_splits(step.longest, window, DECODE_SPLIT)
        parts = step.scratch.take("parts", torch.float32, sequences, heads, splits, shape.head_dim)
        stats = step.scratch.take("part_stats", torch.float32, sequences, heads, splits, 2)
        plan = shape.decode(sequences, splits)
        launch(machine, plan.entry, planned(plan), query_start=starts, parts=parts, part_stats=stats,
               split=DECODE_SPLIT, **shared)  # fmt: skip
        plan = shape.combine(sequences)
        launch(machine, plan.entry, planned(plan), parts=parts, part_stats=stats, seq_lens=step.seq_lens,
               query_start=starts, out=out, window=window, split=DECODE_SPLIT,
               value_unit=shape.value_unit(1.0))  # fmt: skip


def _route(machine: Machine, job: Job) -> None:
    numbers = {name: job.attrs[name] for name in ("top_k", "groups", "top_groups", "scale")}
    launch(machine, f"route_{job.tag}", logits=job.inputs[0], bias=job.weights[0], chosen=job.outputs[0],
           shares=job.outputs[1], softmax=int(job.attrs["scores"] == "softmax"),
           renormalise=int(job.attrs["renormalise"]), **numbers)  # fmt: skip


def _grouped(machine: Machine, job: Job) -> None:
    """Slots are sorted by the first of a layer's products: those after it find them in scratch."""
    (x, chosen), weight, count, scratch = job.inputs, job.weights[0], job.attrs["count"], job.step.scratch
    assert weight is not None
    (tokens, each), epilogue = chosen.shape, job.attrs.get("epilogue", "")
    if not tokens:
        return
    fmt, planes = (weight.format, weight.planes) if isinstance(weight, PackedWeight) else (None, {"w": weight})
    rows, columns = weight.shape if isinstance(weight, Tensor) else weight.format.shape
    plan = plan_grouped((rows, columns), count, _DTYPE[x.dtype].name, tokens, each, fmt, gated=bool(epilogue))
    slots = (job.op.inputs[1], plan.group, plan.grid[2]) if plan.group else None
    is_sorted = slots is not None and slots == job.step.sorted_slots
    job.step.sorted_slots = slots or job.step.sorted_slots
    machine.launch(
        grouped_call(
            machine, plan, fmt, planes, experts=count, epilogue=epilogue, x=x.view(-1, columns), chosen=chosen.view(-1),
            y=job.outputs[0].view(tokens * each, -1), n=rows // count,
            order=scratch.take("slot_order", torch.int32, tokens * each) if plan.group else None,
            blocks=scratch.take("slot_blocks", torch.int32, plan.grid[2], 4) if plan.group else None,
            is_sorted=is_sorted,
        )
    )  # fmt: skip


def _weighted_sum(machine: Machine, job: Job) -> None:
    x, shares = job.inputs
    launch(machine, f"weighted_sum_{job.tag}", x=x, shares=shares, y=job.outputs[0],
           sigmoid=int(job.attrs.get("sigmoid", False)))  # fmt: skip


EXECUTORS: dict[str, Executor] = {
    "embed": _embed,
    "pos_embed": _pos_embed,
    "rms_norm": _norm,
    "layer_norm": _norm,
    "head_rms_norm": _head_norm,
    "elementwise": _elementwise,
    "rope_kv": _rope_kv,
    "w4a16": _capped(_gemm),
    "w8a16": _capped(_gemm),
    "fp8a16": _capped(_gemm),
    "book4a16": _capped(_gemm),
    "k4a16": _capped(_gemm),
    "k8a16": _capped(_gemm),
    "w8a8": _capped(_gemm_int8),
    "quantize_rows": _quantize,
    "lora": _lora,
    "dense_gated": dense,
    "paged_attention": _attention,
    "route": _route,
    "grouped_w4a16": _grouped,
    "grouped_w8a16": _grouped,
    "grouped_fp8a16": _grouped,
    "grouped_book4a16": _grouped,
    "grouped_k4a16": _grouped,
    "grouped_k8a16": _grouped,
    "grouped_dense": _grouped,
    "weighted_sum": _weighted_sum,
}
"""By the registry's kernel name."""
