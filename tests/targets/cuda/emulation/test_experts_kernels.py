"""The kernels of a mixture's experts under emulation: routes, slots by expert, grouped products, sums of parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from emulator import missing
from gemm_cases import make_case, planes_of
from machine import EmulatedMachine, launch
from tolerance import DTYPES, assert_as_good_as_torch

from llmctl.graph.graph import Op
from llmctl.targets.cuda.experts import MAX_EXPERTS, SLOTS, grouped_entries, max_blocks, plan_grouped
from llmctl.targets.cuda.experts_signatures import grouped_call
from llmctl.targets.cuda.layout import CudaFormat
from llmctl.targets.cuda.ops import EXECUTORS, Job, Scratch, StepTensors
from llmctl.targets.reference import kernels as reference

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
TAGS = pytest.mark.parametrize("tag", ["f16", "bf16"])
NAMES = {"f16": "float16", "bf16": "bfloat16"}


def draw(tag: str, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[tag])


@dataclass(frozen=True)
class Stack:
    """A weight of all experts: as the kernels have it, and f32 [experts, n, k]."""

    fmt: CudaFormat | None
    planes: dict[str, torch.Tensor]
    dense: torch.Tensor
    epilogue: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        return self.dense.shape[0] * self.dense.shape[1], self.dense.shape[2]

    def multiply(self, x: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        """y [tokens, chosen * outputs], and what was launched."""
        (tokens, each), (experts, n, k) = chosen.shape, self.dense.shape
        tag = {torch.float16: "f16", torch.bfloat16: "bf16"}[x.dtype]
        plan = plan_grouped(self.shape, experts, NAMES[tag], tokens, each, self.fmt, gated=bool(self.epilogue))
        y = torch.full((tokens * each, n // 2 if self.epilogue else n), torch.nan, dtype=x.dtype)
        emulated = EmulatedMachine()
        order, blocks = torch.empty(tokens * each, dtype=torch.int32), torch.empty(plan.grid[2], 4, dtype=torch.int32)
        emulated.launch(
            grouped_call(emulated, plan, self.fmt, self.planes, experts=experts, epilogue=self.epilogue,
                         x=x.reshape(-1, k), chosen=chosen.reshape(-1), y=y, n=n, order=order, blocks=blocks)
        )  # fmt: skip
        return y.view(tokens, -1), emulated.launched

    def expected(self, x: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return reference.grouped_linear(x.to(dtype), chosen, list(self.dense.to(dtype)), self.epilogue)

    def check(self, x: torch.Tensor, chosen: torch.Tensor) -> list[str]:
        y, launched = self.multiply(x, chosen)
        assert_as_good_as_torch(y, self.expected(x, chosen, torch.float64), self.expected(x, chosen, x.dtype))
        return launched


def packed(
    bits: int, experts: int, n: int, k: int, group: int, *, epilogue: str = "", **more: Any
) -> Stack:  # fmt: skip
    fmt = CudaFormat(bits, (experts * n, k), bool(epilogue), group, experts=experts, **more)
    case = make_case(fmt)
    return Stack(fmt, planes_of(case.linear), case.dense.view(experts, n, k), epilogue)


def dense(tag: str, experts: int, n: int, k: int, epilogue: str = "") -> Stack:
    w = draw(tag, experts * n, k, seed=2) * k**-0.5
    return Stack(None, {"w": w}, w.float().view(experts, n, k), epilogue)


def choices(tokens: int, each: int, experts: int, seed: int = 0) -> torch.Tensor:
    """Distinct experts of each token, the first of them met more than any other."""
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=rng)
    scores[: tokens * 2 // 3, 1] += 1
    return scores.topk(each, -1)[1].int()


def stacks(tag: str) -> dict[str, Stack]:
    return {
        "w4": packed(4, 5, 40, 136, 32),
        "w4_64": packed(4, 5, 33, 264, 64, symmetric=True),
        "w4_row_gated": packed(4, 5, 44, 200, -1, epilogue="silu_mul"),
        "w8_gated": packed(8, 5, 48, 72, 32, epilogue="gelu_tanh_mul"),
        "w8": packed(8, 5, 33, 256, 128, symmetric=True),
        "nf4": packed(4, 5, 40, 136, 64, symmetric=True, book="nf4"),
        "fp8": packed(8, 5, 48, 136, 128, symmetric=True, epilogue="silu_mul", book="fp8_e4m3"),
        "k4": packed(4, 5, 40, 136, 32, minimum=True),
        "k8_gated": packed(8, 5, 48, 136, 16, symmetric=True, epilogue="silu_mul"),
        "dense": dense(tag, 5, 41, 72),
        "dense_gated": dense(tag, 5, 44, 200, "relu_mul"),
    }


@TAGS
@pytest.mark.parametrize("kind", stacks("f16"))
@pytest.mark.parametrize(("tokens", "own"), [(1, False), (1, True), (7, False), (7, True), (19, True)])
def test_products_are_the_reference_s(tag: str, kind: str, tokens: int, own: bool) -> None:
    """``own``: each choice has an input of its own. Nineteen tokens of one expert are more than two blocks' slots."""
    stack, chosen = stacks(tag)[kind], choices(tokens, 3, 5)
    k = stack.dense.shape[2]
    launched = stack.check(draw(tag, tokens, (3 if own else 1) * k), chosen)
    size = SLOTS[tokens * 3 > SLOTS[0] * 5]
    assert launched[:-1] == ([] if tokens == 1 else [f"group_slots_m{size}"])
    assert launched[-1].endswith(f"_m{size}")
    wanted = grouped_entries(stack.shape, 5, NAMES[tag], 3, stack.fmt, gated=bool(stack.epilogue))
    assert set(launched) <= set(wanted)


@TAGS
@pytest.mark.parametrize("kind", ["w4_64", "w8_gated", "dense_gated"])
def test_a_slot_has_the_same_bits_in_any_batch(tag: str, kind: str) -> None:
    stack, chosen = stacks(tag)[kind], choices(19, 3, 5)
    x = draw(tag, 19, stack.dense.shape[2])
    together = stack.multiply(x, chosen)[0]
    few = stack.multiply(x[:5], chosen[:5])[0]
    assert torch.equal(few, together[:5])
    for i in (0, 6, 18):
        assert torch.equal(stack.multiply(x[i : i + 1], chosen[i : i + 1])[0][0], together[i])


@TAGS
@pytest.mark.parametrize("kind", ["w4", "dense"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_that_nobody_chose_are_not_read(tag: str, kind: str, tokens: int) -> None:
    """Their planes are cut off: a read of them is a read out of bounds."""
    stack, chosen = stacks(tag)[kind], torch.tensor([[1, 0, 2]] * tokens, dtype=torch.int32)
    cut = {name: plane[: len(plane) * 3 // 5].clone() for name, plane in stack.planes.items()}
    x = draw(tag, tokens, stack.dense.shape[2])
    y = Stack(stack.fmt, cut, stack.dense).multiply(x, chosen)[0]
    assert torch.equal(y, stack.multiply(x, chosen)[0])


@pytest.mark.parametrize("size", SLOTS)
@pytest.mark.parametrize(("tokens", "each", "experts"), [(2, 1, 1), (5, 3, 7), (70, 2, 3), (9, 4, 130)])
def test_slots_by_expert(size: int, tokens: int, each: int, experts: int) -> None:
    chosen = choices(tokens, each, experts) if experts > 1 else torch.zeros(tokens, each, dtype=torch.int32)
    flat, slots = chosen.reshape(-1), tokens * each
    count = max_blocks(slots, experts, size) + 2
    order, blocks = torch.empty(slots, dtype=torch.int32), torch.empty(count, 4, dtype=torch.int32)
    launch(f"group_slots_m{size}", chosen=flat, order=order, blocks=blocks, experts=experts)
    assert sorted(order.tolist()) == list(range(slots))
    used = [block for block in blocks.tolist() if block[2]]
    assert blocks[len(used) :].abs().sum() == 0
    assert len(used) == sum(-(-n // size) for n in flat.bincount().tolist()) <= count - 2
    place = 0
    for expert, first, here, _ in used:
        assert first == place
        assert 0 < here <= size
        assert (flat[order[first : first + here].long()] == expert).all()
        place += here
    assert place == slots


@TAGS
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("experts", "groups", "top_groups"), [(12, 1, 1), (12, 4, 2), (66, 33, 3), (5, 1, 1)])
@pytest.mark.parametrize("biased", [True, False])
def test_routes_are_the_reference_s(
    tag: str, scores: str, renormalise: bool, experts: int, groups: int, top_groups: int, biased: bool
) -> None:
    """Many ties: of equal scores the first expert is chosen, of equal groups the first group."""
    rng = torch.Generator().manual_seed(experts)
    logits = torch.randint(-2, 3, (9, experts), generator=rng).to(DTYPES[tag])
    bias = torch.randint(-2, 3, (experts,), generator=rng) / 4 if biased else None
    attrs = {"top_k": 4, "renormalise": renormalise, "groups": groups, "top_groups": top_groups, "scale": 1.5}
    chosen, shares = torch.empty(9, 4, dtype=torch.int32), torch.empty(9, 4, dtype=logits.dtype)
    launch(f"route_{tag}", logits=logits, bias=bias, chosen=chosen, shares=shares, softmax=int(scores == "softmax"),
           **{**attrs, "renormalise": int(renormalise)})  # fmt: skip
    expected, wanted = reference.route(logits, bias, scores=scores, **attrs)  # type: ignore[arg-type]
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(shares, wanted, rtol=2e-2 if tag == "bf16" else 2e-3, atol=0)


@TAGS
def test_a_bias_of_float32_decides(tag: str) -> None:
    """Biases that no 16 bits tell apart: the last expert has the highest of them, the first would win a tie."""
    bias = 0.5 + torch.arange(6) * 1e-6
    assert len(bias.to(DTYPES[tag]).unique()) == 1
    chosen, shares = torch.empty(2, 2, dtype=torch.int32), torch.empty(2, 2, dtype=DTYPES[tag])
    launch(f"route_{tag}", logits=torch.zeros(2, 6).to(DTYPES[tag]), bias=bias, chosen=chosen, shares=shares, softmax=0,
           top_k=2, renormalise=0, groups=1, top_groups=1, scale=1.0)  # fmt: skip
    assert chosen.tolist() == [[5, 4]] * 2


def test_a_row_that_is_not_finite_chooses_experts_that_there_are() -> None:
    """Steps are padded: what lies in rows that nobody asked for is routed as well."""
    logits = torch.full((2, 6), torch.nan).half()
    logits[1] = torch.tensor([-torch.inf, torch.inf, torch.nan, 1, 2, 3])
    chosen, shares = torch.empty(2, 4, dtype=torch.int32), torch.empty(2, 4).half()
    for groups, top_groups in ((1, 1), (3, 2)):
        launch("route_f16", logits=logits, chosen=chosen, shares=shares, softmax=1, top_k=4, renormalise=1, scale=1.0,
               groups=groups, top_groups=top_groups)  # fmt: skip
        assert chosen.min() >= 0
        assert chosen.max() < 6
        assert all(len(set(row)) == 4 for row in chosen.tolist())


@TAGS
@pytest.mark.parametrize(
    ("rows", "parts", "width", "sigmoid"), [(1, 1, 8, True), (5, 3, 72, False), (3, 8, 1032, False)]
)
def test_sums_of_parts(tag: str, rows: int, parts: int, width: int, sigmoid: bool) -> None:
    x, shares = draw(tag, rows, parts * width), draw(tag, rows, parts, seed=1)
    y = torch.empty(rows, width, dtype=x.dtype)
    launch(f"weighted_sum_{tag}", x=x, shares=shares, y=y, sigmoid=int(sigmoid))
    exact = x.double().view(rows, parts, width) * (shares.double().sigmoid() if sigmoid else shares.double())[..., None]
    assert_as_good_as_torch(y, exact.sum(1), reference.weighted_sum(x, shares, sigmoid))


def test_what_the_kernels_cannot_take_is_refused() -> None:
    x, chosen, w = torch.zeros(2, 64).half(), torch.zeros(3, dtype=torch.int32), torch.zeros(64, 64).half()
    plan = plan_grouped((64, 64), 2, "float16", 1, 3, None, gated=False)
    tensors = {"planes": {"w": w}, "x": x, "chosen": chosen, "y": torch.zeros(3, 32).half(), "n": 32}
    for changes, words in (
        ({}, "3 slots are not those of 2 rows"),
        ({"x": x[:0]}, "3 slots are not those of 0 rows"),
        ({"x": x[:1], "y": torch.zeros(3, 16).half()}, "y: expected 32 columns, found 16"),
        ({"x": x[:1], "planes": {"w": w[:, :32]}}, "w"),
        ({"x": x[:1], "chosen": chosen.float()}, "chosen"),
    ):
        with pytest.raises(ValueError, match=words):
            grouped_call(EmulatedMachine(), plan, None, experts=2, **{**tensors, **changes})
    many = torch.zeros(1, MAX_EXPERTS + 1).half()
    with pytest.raises(ValueError, match="experts"):
        launch("route_f16", logits=many, chosen=torch.zeros(1, 2, dtype=torch.int32), shares=torch.zeros(1, 2).half(),
               softmax=1, top_k=2, renormalise=1, scale=1.0, groups=1, top_groups=1)  # fmt: skip


def test_no_tokens_launch_nothing() -> None:
    emulated = EmulatedMachine()
    x, chosen, y = torch.zeros(0, 64).half(), torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0, 64).half()
    op = Op("grouped_linear", "experts", ("x", "chosen"), ("y",), ("w",), {"count": 2})
    none = torch.zeros(0, dtype=torch.int64)
    step = StepTensors(none, none, none, none, none, none, 0, 0, 0, {}, lambda _: (none, none), Scratch("cpu"))
    EXECUTORS["grouped_dense"](emulated, Job(op, [x, chosen], [y], [torch.zeros(64, 64).half()], step))
    assert emulated.launched == []
