"""The reference kernels: one torch function per op kind, as ``graph/ops.py`` names them.

The oracle that every other kernel is held to.

Activations are ``[T, width]`` in the compute dtype (float32, or bfloat16/float16). Norms and softmax are computed in
float32 whatever that is. A paged KV cache is ``[2, num_blocks, block_size, kv_heads, head_dim]`` (keys, then values);
the slot of a token is ``block_id * block_size + offset``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# fn of an act op, and (with the suffix "_mul") epilogue of a gated linear.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences of one step that attend together: B of them with Tq query tokens each (B == 1 unless Tq == 1).

    Attributes:
        rows: which rows of q they are, B * Tq: a slice, or i64 indices.
        slots: i64 [B * L], KV slots of the context, padded to the longest with any valid slot.
        mask: f32-like [B, 1, Tq, L] in the compute dtype, 0 where a query may look, -inf elsewhere; None = everywhere.
        batch, queries, context: B, Tq and L.
    """

    rows: slice | Tensor
    slots: Tensor
    mask: Tensor | None
    batch: int
    queries: int
    context: int


@dataclass(frozen=True)
class AdapterWeights:
    """Low-rank adapters of one linear: a [adapters, rank, K], b [adapters, N, rank], scales f32 [adapters]. Those of
    smaller ranks are padded with zeros."""

    a: Tensor
    b: Tensor
    scales: Tensor


class Scratch:
    """Buffers for gathered keys and values, reused from call to call: a fresh one costs its page faults every time."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, int], Tensor] = {}

    def take(self, which: int, like: Tensor, rows: int) -> Tensor:
        """Uninitialised ``[rows, width of like]`` in its dtype; overwritten by the next take of the same ``which``."""
        size, key = rows * like.shape[1], (like.dtype, which)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._buffers[key][:size].view(rows, like.shape[1])


def embed(ids: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
    """Rows of ``w`` [V, H] for ids [T]."""
    x = F.embedding(ids, w)
    return x if scale == 1.0 else x * scale


def pos_embed(x: Tensor, positions: Tensor, w: Tensor, offset: int = 0) -> Tensor:
    """``x + w[positions + offset]``."""
    return x + F.embedding(positions + offset if offset else positions, w)


def rms_norm(x: Tensor, w: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), in float32 until after ``w``."""
    w = w.float() + 1 if plus_one else w.float()
    return F.rms_norm(x.float(), w.shape, w, eps).to(x.dtype)


def layer_norm(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis, in float32."""
    return F.layer_norm(x.float(), w.shape, w.float(), None if b is None else b.float(), eps).to(x.dtype)


def head_rms_norm(x: Tensor, w: Tensor, eps: float, head_dim: int) -> Tensor:
    """RMS norm of each head: x [T, heads * head_dim], w [head_dim]."""
    return rms_norm(x.reshape(x.shape[0], -1, head_dim), w, eps).view(x.shape)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """``x @ w.T + b`` with w [out, in]."""
    return F.linear(x, w, b)


def capped(x: Tensor, scale: float = 1.0, softcap: float = 0.0) -> Tensor:
    """``scale * x``, then ``softcap * tanh(x / softcap)`` unless that is 0; in float32."""
    y = x.float() * scale
    return (softcap * torch.tanh(y / softcap) if softcap else y).to(x.dtype)


def linear_splits(x: Tensor, w: Tensor, b: Tensor | None, splits: Sequence[int]) -> tuple[Tensor, ...]:
    """A merged linear; one output per split."""
    return F.linear(x, w, b).split_with_sizes(list(splits), dim=-1)


def linear_gated(x: Tensor, w: Tensor, b: Tensor | None, epilogue: str) -> Tensor:
    """``act(gate) * up`` of a merged linear whose first half of rows is the gate; epilogue is ``<fn>_mul``."""
    return act_mul(F.linear(x, w, b), epilogue.removesuffix("_mul"))


def act_mul(x: Tensor, fn: str) -> Tensor:
    """``fn(gate) * up`` of gate and up side by side, [T, 2 F] -> [T, F]."""
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[fn](gate).mul_(up)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(q, scale)``, int8 [T, K] and f32 [T, 1], with ``x ~ q * scale``: scale is a row's largest magnitude / 127."""
    x = x.float()
    most = x.abs().amax(-1, keepdim=True)
    steps = torch.where(most > 0, 127.0 / most, 0.0)
    return torch.round(x * steps).clamp(-127, 127).to(torch.int8), most / 127.0


def act_mul_s8(x: Tensor, fn: str) -> tuple[Tensor, Tensor]:
    """``quantize_rows(act_mul(x))`` in float32, without a rounding between."""
    return quantize_rows(act_mul(x.float(), fn))


def dequantize_rows(q: Tensor, scale: Tensor) -> Tensor:
    """``q * scale`` in float32."""
    return q.float() * scale


def lora(x: Tensor, y: Tensor, adapters: Tensor, weights: AdapterWeights) -> Tensor:
    """``y + scale * (x @ a.T) @ b.T`` with each row's own adapter (Hu et al. 2021); rows whose adapter is -1 keep y.

    Args:
        x: [T, K]. y: [T, N]. adapters: i32 [T].
    """
    z = y.clone()
    for adapter in adapters.unique().tolist():
        if adapter < 0:
            continue
        rows = (adapters == adapter).nonzero()[:, 0]
        low = F.linear(x[rows], weights.a[adapter].to(x.dtype))
        z[rows] += F.linear(low, weights.b[adapter].to(x.dtype)) * weights.scales[adapter].to(x.dtype)
    return z


def route(
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    scores: str,
    renormalise: bool,
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """``(experts, shares)``, i32 and logits' dtype [T, top_k], of logits [T, E]; in float32. Of equal scores the first
    wins.

    Experts are chosen by score plus ``bias`` [E] within the ``top_groups`` groups whose two best add up to the most
    (DeepSeek-AI 2024, DeepSeek-V3, section 2.1.2).
    """
    found = logits.float().softmax(-1) if scores == "softmax" else logits.float().sigmoid()
    wanted = found if bias is None else found + bias
    if groups > top_groups:
        parts = wanted.view(len(wanted), groups, -1)
        best = parts.topk(2, dim=-1)[0].sum(-1).sort(dim=-1, descending=True, stable=True)[1][:, :top_groups]
        out = torch.ones(parts.shape[:2], dtype=torch.bool, device=parts.device).scatter_(1, best, False)
        wanted = parts.masked_fill(out[..., None], -torch.inf).flatten(1)
    experts = wanted.sort(dim=-1, descending=True, stable=True)[1][:, :top_k]
    shares = found.gather(1, experts)
    shares = shares / (shares.sum(-1, keepdim=True) + 1e-20) if renormalise else shares
    return experts.to(torch.int32), (shares * scale).to(logits.dtype)


def grouped_linear(x: Tensor, experts: Tensor, w: Sequence[Tensor], epilogue: str = "") -> Tensor:
    """``x @ w[e].T`` of each token's experts side by side, [T, k * O].

    Args:
        x: [T, I], or [T, k * I]: an input for each expert. experts: i32 [T, k]. w: [O, I] an expert.
        epilogue: as ``linear_gated``.
    """
    (tokens, chosen), (out, width), flat = experts.shape, w[0].shape, experts.reshape(-1)
    rows = x.reshape(tokens, -1, width).expand(tokens, chosen, -1).reshape(tokens * chosen, -1)
    y = x.new_empty(len(rows), out // 2 if epilogue else out)
    for expert in flat.unique().tolist():
        its = (flat == expert).nonzero()[:, 0]
        part = rows[its]
        y[its] = linear_gated(part, w[expert], None, epilogue) if epilogue else linear(part, w[expert])
    return y.view(tokens, -1)


def weighted_sum(x: Tensor, shares: Tensor, sigmoid: bool = False) -> Tensor:
    """The sum of x's parts [T, k, H], each times its share [T, k], one after the other; ``sigmoid``: shares are its
    arguments."""
    shares = shares.float().sigmoid().to(x.dtype) if sigmoid else shares
    parts = x.view(*shares.shape, -1) * shares[..., None]
    y = parts[:, 0]
    for j in range(1, shares.shape[1]):
        y = y + parts[:, j]
    return y


def act(x: Tensor, fn: str) -> Tensor:
    """Elementwise activation."""
    return ACTIVATIONS[fn](x)


# Elementwise product and sum.
mul = torch.mul
add = torch.add


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float, plus_one: bool = False) -> tuple[Tensor, Tensor]:
    """``(norm(sum), sum)`` with ``sum = x + residual``."""
    total = x + residual
    return rms_norm(total, w, eps, plus_one), total


def add_layer_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``(norm(sum), sum)`` with ``sum = x + residual``."""
    total = x + residual
    return layer_norm(total, w, b, eps), total


def rms_norm_s8(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``quantize_rows(rms_norm(x))`` in float32, without a rounding between."""
    return quantize_rows(rms_norm(x.float(), w, eps))


def layer_norm_s8(x: Tensor, w: Tensor, b: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``quantize_rows(layer_norm(x))`` in float32, without a rounding between."""
    return quantize_rows(layer_norm(x.float(), w, b, eps))


def add_rms_norm_s8(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(q, scale, sum)`` of ``rms_norm_s8(sum)`` with ``sum = x + residual``."""
    total = x + residual
    return *rms_norm_s8(total, w, eps), total


def add_layer_norm_s8(
    x: Tensor, residual: Tensor, w: Tensor, b: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``(q, scale, sum)`` of ``layer_norm_s8(sum)`` with ``sum = x + residual``."""
    total = x + residual
    return *layer_norm_s8(total, w, b, eps), total


def rope_factors(cos: Tensor, sin: Tensor, style: str) -> tuple[Tensor, Tensor]:
    """Spread per-pair cos and sin [T, R/2] to what ``rope`` multiplies by, [T, 1, R], sign of sin included."""
    if style == "neox":
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
    if style == "gptj":
        return torch.stack((cos, cos), -1).flatten(-2)[:, None], torch.stack((-sin, sin), -1).flatten(-2)[:, None]
    raise ValueError(f"unknown rope style '{style}'")


def rope(x: Tensor, factors: tuple[Tensor, Tensor], head_dim: int, style: str) -> Tensor:
    """Rotate the first R dimensions of every head of x [T, heads * head_dim]; R is the width of ``factors``.

    Pairs are (i, i + R/2) for ``neox`` and (2i, 2i + 1) for ``gptj``.
    """
    cos, sin = factors
    heads = x.reshape(x.shape[0], -1, head_dim)
    width = cos.shape[-1]
    turned = heads if width == head_dim else heads[..., :width]
    pair, axis = ((2, width // 2), -2) if style == "neox" else ((width // 2, 2), -1)
    partner = turned.reshape(*heads.shape[:2], *pair).flip(axis).view(turned.shape)
    turned = torch.addcmul(turned * cos, partner, sin)
    if width != head_dim:
        turned = torch.cat((turned, heads[..., width:]), -1)
    return turned.view(x.shape)


def kv_write(cache: Tensor, k: Tensor, v: Tensor, slots: Tensor, *, padded: bool = True) -> None:
    """Store k and v [T, kv_heads * head_dim] at slots i64 [T]; rows whose slot is -1 are padding and are dropped.

    ``padded=False`` promises that no slot is negative and saves the look.
    """
    if padded:
        keep = slots >= 0
        slots, k, v = slots[keep], k[keep], v[keep]
    width = k.shape[-1]
    cache[0].view(-1, width).index_copy_(0, slots, k)
    cache[1].view(-1, width).index_copy_(0, slots, v)


def rope_kv_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: tuple[Tensor, Tensor],
    head_dim: int,
    style: str,
    cache: Tensor,
    slots: Tensor,
    *,
    padded: bool = True,
) -> Tensor:
    """``rope`` of q and k, and ``kv_write`` of the turned k and v; the turned q."""
    turned = rope(q, factors, head_dim, style)
    kv_write(cache, rope(k, factors, head_dim, style), v, slots, padded=padded)
    return turned


def paged_attention(
    q: Tensor,
    cache: Tensor,
    groups: Sequence[AttentionGroup],
    heads: int,
    scale: float,
    softcap: float = 0.0,
    scratch: Scratch | None = None,
) -> Tensor:
    """Softmax attention of q [T, heads * head_dim] over the cached context of each token's sequence.

    Query head h reads key/value head ``h // (heads / kv_heads)``. Rows in no group come out as zero.
    """
    _, blocks, block_size, kv_heads, dim = cache.shape
    keys, values = (cache[i].view(blocks * block_size, kv_heads * dim) for i in (0, 1))
    scratch = scratch or Scratch()
    out = torch.zeros_like(q) if sum(g.batch * g.queries for g in groups) < q.shape[0] else torch.empty_like(q)
    for group in groups:
        shape = (group.batch, group.context, kv_heads, dim)
        rows = len(group.slots)
        k = torch.index_select(keys, 0, group.slots, out=scratch.take(0, keys, rows)).view(shape)
        v = torch.index_select(values, 0, group.slots, out=scratch.take(1, values, rows)).view(shape)
        out[group.rows] = _attend(q[group.rows], k.transpose(1, 2), v.transpose(1, 2), group, heads, scale, softcap)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, group: AttentionGroup, heads: int, scale: float, softcap: float) -> Tensor:
    """One group: q [B * Tq, heads * dim], k and v [B, kv_heads, L, dim]."""
    kv_heads, dim = k.shape[1], k.shape[3]
    if group.queries == 1:
        # The query heads of one kv head become the query axis: each key is then read once, not once per query head.
        folded = q.view(group.batch, kv_heads, heads // kv_heads, dim)
        return _softmax_attention(folded, k, v, group.mask, scale, softcap).reshape(q.shape)
    unfolded = q.reshape(group.batch, group.queries, heads, dim).transpose(1, 2)
    return _softmax_attention(unfolded, k, v, group.mask, scale, softcap).transpose(1, 2).reshape(q.shape)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    if not softcap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = softcap * torch.tanh(q.float() @ k.float().transpose(-1, -2) * (scale / softcap))
    scores = scores if mask is None else scores + mask.float()
    return (torch.softmax(scores, -1) @ v.float()).to(q.dtype)


def gather_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x by i64 index."""
    return x.index_select(0, rows)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor, group_index: Tensor) -> Tensor:
    """``(codes - zeros) * scales`` in float32: codes u8 [N, K], scales and zeros [N, G], group_index i64 [K]."""
    return (codes.float() - zeros.float()[:, group_index]) * scales.float()[:, group_index]
