"""The cuda target where no GPU is needed: what is published, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import MIXTURES, tiny_model

from llmctl.errors import CompileError, UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.targets.base import BuildOptions
from llmctl.targets.cuda.experts import most_tokens, plan_grouped
from llmctl.targets.planes import total_bytes
from llmctl.targets.table import parse_target

TARGET = parse_target("cuda:sm_90")


@pytest.mark.parametrize(
    ("name", "content"), [("norm.cubin", b""), ("norm.cubin", b"\0" * 64), ("norm.ptx", b""), ("norm.ptx", b" \n ")]
)
def test_a_broken_module_is_not_published(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CompileError, match=f"{name}: expected a compiled module, found b'"):
        TARGET.try_modules([tmp_path / name])


def test_whole_modules_are(tmp_path: Path) -> None:
    (tmp_path / "norm.cubin").write_bytes(b"\x7fELF" + bytes(60))
    (tmp_path / "norm.ptx").write_bytes(b".version 8.0")
    TARGET.try_modules([tmp_path / "norm.cubin", tmp_path / "norm.ptx"])


@pytest.mark.parametrize(("experts", "chosen"), [(128, 8), (6, 2), (4096, 7), (1, 1)])
def test_the_largest_step_of_a_mixture_has_the_blocks_of_a_grid(experts: int, chosen: int) -> None:
    most = most_tokens(experts, chosen)
    blocks = [
        plan_grouped((experts * 64, 64), experts, "float16", tokens, chosen, None, gated=False).grid[2]
        for tokens in (most, most + 1)
    ]
    assert blocks[0] <= 65535 < blocks[1]


def test_a_step_of_too_many_choices_is_refused_when_memory_is_planned() -> None:
    graph, _ = tiny_model(MIXTURES["qwen3_moe"], None)
    options = BuildOptions("float16", 64, 16, "float16", graph.passes)
    most = most_tokens(6, 2)
    assert TARGET.activation_bytes(graph, options, most, 4) > 0
    with pytest.raises(UsageError, match=f"at most {most} for a cuda target and 2 experts a token, found {most + 1}"):
        TARGET.activation_bytes(graph, options, most + 1, 4)


def test_what_no_kernel_reads_packed_counts_dense_too() -> None:
    scheme = QuantScheme(4, 32, symmetric=False)
    extra = []
    for group in (32, 16):
        graph, _ = tiny_model(MIXTURES["qwen3_moe"], replace(scheme, group_size=group))
        options = BuildOptions("float16", 64, 16, "float16", graph.passes)
        planes = [plane for own in TARGET.planes(graph, options).values() for plane in own]
        extra.append(TARGET.resident_bytes(graph, options, planes) - total_bytes(planes))
    dense = sum(w.shape[0] * w.shape[1] * 2 for w in graph.weights.values() if w.quant is not None)
    assert extra == [0, dense]
