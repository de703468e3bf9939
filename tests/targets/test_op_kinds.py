"""Every target's tables by op kind against the declaration: each kind is implemented or refused by name."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from llmctl.errors import UnsupportedModelError
from llmctl.graph.graph import INPUT_IDS, Buffer, Graph, Op
from llmctl.graph.ops import OP_KINDS
from llmctl.graph.shapes import ACTIVATIONS
from llmctl.targets.cpu import abi, binding
from llmctl.targets.cuda import gemm, signatures
from llmctl.targets.cuda.ops import EXECUTORS
from llmctl.targets.cuda.registry import KERNELS, SAMPLER_OPS
from llmctl.targets.reference import kernels
from llmctl.targets.reference.interpreter import BINDERS

SAMPLING = {op.kind for op in SAMPLER_OPS}
CUDA_KINDS = {kind for kernel in KERNELS for kind in kernel.kinds}
# Implemented, refused. Of what no CUDA kernel takes, the registry falls back to torch; no kind is left to that alone.
TARGETS: dict[str, tuple[Collection[str], Collection[str]]] = {
    "reference": (BINDERS, ()),
    "cpu": (binding.LOWERINGS, binding.REFUSED_KINDS),
    "cuda": (CUDA_KINDS - SAMPLING, ()),
}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kind_is_implemented_or_refused(target: str) -> None:
    implemented, refused = map(set, TARGETS[target])
    assert implemented | refused == set(OP_KINDS)
    assert not implemented & refused


def test_every_kind_has_a_reference_function() -> None:
    for kind in OP_KINDS.values():
        assert callable(getattr(kernels, kind.reference, None)), kind.name


def test_every_cuda_kernel_of_a_graph_has_an_executor() -> None:
    assert SAMPLING <= CUDA_KINDS
    assert {kernel.name for kernel in KERNELS if kernel.kinds - SAMPLING} == set(EXECUTORS)


def test_every_target_has_the_activations() -> None:
    assert set(kernels.ACTIVATIONS) == set(abi.ACT) - {""} == set(signatures.ACTIVATIONS) == set(ACTIVATIONS)
    assert set(gemm.ACTIVATION) - {""} == {f"{fn}_mul" for fn in ACTIVATIONS}


@pytest.mark.parametrize("kind", [*binding.REFUSED_KINDS, "swirl"])
def test_the_cpu_target_says_why_it_refuses(kind: str) -> None:
    buffers = {name: Buffer(name, 8) for name in (INPUT_IDS, "y")}
    graph = Graph("llama", 8, 8, 1, 8, (), buffers, {}, (Op(kind, "op", (INPUT_IDS,), ("y",)),))
    with pytest.raises(UnsupportedModelError) as caught:
        binding.Lowering(graph, {}).run()
    reason = binding.REFUSED_KINDS.get(kind, "it is unknown")
    assert caught.value.message == f"op '{kind}' has no native CPU kernel: {reason}"


@pytest.mark.parametrize("variant", OP_KINDS["linear"].variants)
def test_the_cpu_target_has_or_refuses_every_variant_of_a_linear(variant: str) -> None:
    buffers = {name: Buffer(name, 8) for name in (INPUT_IDS, "y")}
    op = Op("linear", "op", (INPUT_IDS,), ("y",), ("w",), {variant: True})
    lowering = binding.Lowering(Graph("llama", 8, 8, 1, 8, (), buffers, {}, (op,)), {})
    if variant in ("splits", "epilogue", "scale", "softcap"):
        with pytest.raises(KeyError, match="w"):  # it gets as far as the weight
            lowering.run()
    else:
        with pytest.raises(UnsupportedModelError, match=f"op 'linear with {variant}' has no native CPU kernel"):
            lowering.run()
