"""What the launcher makes of arguments: exact scalars, geometry, and a refusal in words for whatever a kernel cannot
take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llmctl.targets.cuda.call import Array, Call, Geometry, Signature, bind, evaluate
from llmctl.targets.cuda.launch import CudaMachine, argument_words
from llmctl.targets.cuda.signatures import SIGNATURES, prepare, read, write


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.float16)


def norm(**changes: Any) -> dict[str, Any]:
    return {"x": half(3, 64), "w": half(64), "y": half(3, 64), "eps": 1e-5, "plus_one": 0} | changes


def head(**changes: Any) -> dict[str, Any]:
    arguments = {"x": half(3, 80)[:, 16:], "w": half(32), "y": half(3, 64), "heads": 2, "eps": 1e-5, "plus_one": 0}
    return arguments | changes


def rope(**changes: Any) -> dict[str, Any]:
    numbers = {"heads": 0, "kv_heads": 2, "head_dim": 64, "rotary_dim": 0, "gptj": 0, "key_scale": 1, "value_scale": 1}
    cache = {"keys": half(32, 2, 64), "values": half(32, 2, 64)}
    return (
        {"k": half(5, 128), "v": half(5, 128), "slots": torch.zeros(5, dtype=torch.int64)} | cache | numbers | changes
    )


def test_a_call_is_plain_data() -> None:
    arguments = norm()
    call = prepare("rms_norm_f16", **arguments)
    assert (call.source, call.geometry, call.empty) == ("norm.cu", Geometry((3, 1, 1), 256), False)
    x, w, y, *numbers = call.arguments
    assert [(p.tensor is arguments[n], p.use) for p, n in ((x, "x"), (w, "w"), (y, "y"))] == [
        (True, "read"), (True, "read"), (True, "write"),
    ]  # fmt: skip
    assert numbers == [64, np.float32(1e-5), 0]
    assert [type(number) for number in numbers] == [np.int32, np.float32, np.int32]


def test_strides_and_sizes_come_from_the_tensors() -> None:
    call = prepare("head_rms_norm_f16", **head())
    assert [int(a) for a in call.arguments[3:8]] == [3, 2, 32, 80, 64]
    assert call.geometry == Geometry((2, 1, 1), 128)
    call = prepare("rope_kv_f16_f16", **rope())
    assert call.arguments[0] is None
    assert call.geometry.grid == (5, 1, 1)


def test_no_rows_are_nothing_to_launch() -> None:
    call = prepare("rms_norm_f16", **norm(x=half(0, 64), y=half(0, 64)))
    assert call.empty
    CudaMachine({}).launch(call)


@pytest.mark.parametrize(
    ("entry", "arguments", "message"),
    [
        ("rms_norm_f32", {}, "no CUDA kernel 'rms_norm_f32'"),
        ("rms_norm_f16", norm(x=torch.zeros(3, 64)), "x: expected float16, found float32"),
        ("rms_norm_f16", norm(x=half(64)), "x: expected [rows, hidden], found 1 dimensions"),
        ("rms_norm_f16", norm(y=half(2, 64)), "y: expected [rows, hidden] = [3, 64], found [2, 64]"),
        ("rms_norm_f16", norm(w=half(65)), "w: expected [hidden] = [64], found [65]"),
        ("rms_norm_f16", norm(x=half(3, 128)[:, :64]), "x: expected a contiguous tensor"),
        ("rms_norm_f16", norm(x=half(200)[4:196].view(3, 64)), "x: expected an address that is a multiple of 16"),
        ("rms_norm_f16", norm(x=half(3, 60), y=half(3, 60), w=half(60)), "hidden: expected a multiple of 8, found 60"),
        ("rms_norm_f16", norm(w=None), "w: expected a tensor of f16, found none"),
        ("rms_norm_f16", norm(z=1), "arguments: expected some of"),
        ("rms_norm_f16", norm(hidden=32), "x: expected [rows, hidden] = "),
        ("rms_norm_f16", norm(eps="x"), "eps: expected a number"),
        ("rms_norm_f16", norm(plus_one=2**31), "plus_one: expected an integer of 32 bits"),
        ("rms_norm_f16", norm(plus_one=0.5), "plus_one: expected an integer, found 0.5"),
        ("rms_norm_f16", {k: v for k, v in norm().items() if k != "eps"}, "eps: expected a number (f32), found none"),
        ("rms_norm_f16", norm(y=half(3, 64).to("meta")), "y: expected a tensor on cpu like 'x', found meta"),
        ("rms_norm_f16", norm(y=half(1, 64).expand(3, 64)), "y: expected a contiguous tensor"),
        ("head_rms_norm_f16", head(x=half(3, 72)[:, 8:].t().contiguous().t()), "x: expected rows whose elements lie"),
        ("head_rms_norm_f16", head(x=half(3, 68)[:, :64]), "x_stride: expected a multiple of 8, found 68"),
        ("head_rms_norm_f16", head(y=half(1, 64).expand(3, 64)), "y: expected elements of its own"),
        ("rope_kv_f16_f16", rope(slots=None), "slots: expected a tensor, because kv_heads is 2, found none"),
        ("rope_kv_f16_s8", rope(keys=torch.zeros(32, 2, 64, dtype=torch.int8),
                                values=torch.zeros(32, 2, 64, dtype=torch.int8)), "key_scales: expected a tensor"),
        ("rope_kv_f16_f16", rope(rotary_dim=64), "positions: expected a tensor, because rotary_dim is 64"),
        ("rope_kv_f16_f16", rope(rotary_dim=128), "rotary_dim: expected at most 64, found 128"),
        ("rope_kv_f16_f16", rope(keys=half(31, 2, 64)), "values: expected [cells, kv_heads, head_dim] = [31, 2, 64]"),
    ],
)  # fmt: skip
def test_refusals(entry: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        prepare(entry, **arguments)
    assert message in str(error.value)
    assert message.startswith("no CUDA") or str(error.value).startswith(entry)


def test_planned_launches() -> None:
    signature = Signature("k", "k.cu", (read("x", "f16", "n"), write("y", "f16", "n")))
    arguments = {"x": half(8), "y": half(8)}
    with pytest.raises(ValueError, match="the launch geometry is the caller's to give"):
        bind(signature, arguments)
    assert bind(signature, arguments, Geometry((1, 2, 3), 64, 4096)).geometry.shared == 4096
    with pytest.raises(ValueError, match=r"a grid of .* is beyond"):
        bind(signature, arguments, Geometry((1, 70_000, 1), 64))


SIZES = {"7": 7, "a": 10, "a*b": 30, "2*a": 20, "a/2": 5, "a/b": -1, "a/+b": 4, "a+1": 11}


@pytest.mark.parametrize(("formula", "value"), SIZES.items())
def test_sizes(formula: str, value: int) -> None:
    assert evaluate(formula, {"a": 10, "b": 3}) == value


def test_sizes_that_nothing_tells() -> None:
    with pytest.raises(ValueError, match="size 'c' in 'a\\*c' is not given"):
        evaluate("a*c", {"a": 1})
    with pytest.raises(ValueError, match="not a size: 'a-1'"):
        evaluate("a-1", {"a": 1})


def test_every_formula_can_be_read() -> None:
    for signature in SIGNATURES.values():
        shapes = [p.shape for p in signature.parameters if isinstance(p, Array)]
        names = {size for shape in shapes for size in shape if size.isidentifier()}
        names |= {p.name for p in signature.parameters}
        for size in (size for shape in shapes for size in shape):
            assert evaluate(size, dict.fromkeys(names, 32)) >= 0


def test_a_gpu_launch_takes_only_cuda_tensors() -> None:
    with pytest.raises(ValueError, match="expected tensors on a CUDA device, found one on cpu"):
        argument_words(prepare("rms_norm_f16", **norm()))


def test_arguments_of_a_launch_lie_in_the_low_bytes_of_64_bits() -> None:
    call = Call("k", "k.cu", Geometry((1, 1, 1), 32), (None, np.int32(-2), np.float32(1.5)))
    assert argument_words(call) == [0, 2**32 - 2, 0x3FC00000]
