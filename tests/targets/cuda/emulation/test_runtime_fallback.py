"""Ops and weights that no CUDA kernel takes: torch executes them, right and said aloud, or the engine is refused."""

from __future__ import annotations

import logging

import pytest
from cuda_model import emulated_runtime
from emulator import missing
from test_whole_graph import SIZES, _generate
from tiny_models import LLAMA, tiny_model

from llmctl.errors import EngineLoadError
from llmctl.graph.graph import QuantScheme
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.reference.runtime import ReferenceRuntime

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
W4 = QuantScheme(4, 64, symmetric=False)
READS_NONE = "no CUDA kernel reads 8 weights as they are quantized"


@pytest.mark.parametrize(
    ("config", "quant", "said", "captured"),
    [
        ({**LLAMA, "head_dim": 48}, W4, "no CUDA kernel for 'attention' ops: head size 48; the kernels have", False),
        (LLAMA, QuantScheme(3, 16, symmetric=False), READS_NONE, True),
        (LLAMA, QuantScheme(4, 64, symmetric=False, minimum=True), READS_NONE, True),
        (LLAMA, QuantScheme(8, 16, symmetric=True, book="fp8_e4m3", block_rows=32), READS_NONE, True),
        (LLAMA, QuantScheme(4, 16, symmetric=True, book="nf4"), READS_NONE, True),
    ],
    ids=["attention", "groups of 16", "minimums", "fp8 blocks", "nf4 of 16"],
)
def test_torch_executes_it_and_a_line_says_so(config, quant, said, captured, caplog):
    graph, weights = tiny_model(config, quant, CUDA_PASSES)
    with caplog.at_level(logging.WARNING, "llmctl.cuda"):
        runtime = emulated_runtime(graph, weights, "float16", **SIZES)
    assert any(message.startswith(said) for message in caplog.messages)
    assert runtime._captures == captured
    half = ReferenceRuntime(graph, weights, dtype="float16", **SIZES)
    single = ReferenceRuntime(graph, weights, dtype="float32", **SIZES)
    tokens, logits = _generate(runtime, 3)
    expected, own = _generate(half, 3)
    exact = _generate(single, 3, expected)[1]
    assert tokens == expected
    noise = max((a - b).abs().max() for a, b in zip(own, exact, strict=True))
    assert max((a - b).abs().max() for a, b in zip(logits, exact, strict=True)) <= 2 * noise + 1e-3


def test_a_cache_that_torch_cannot_read_is_refused():
    graph, weights = tiny_model({**LLAMA, "head_dim": 48}, None, CUDA_PASSES)
    with pytest.raises(EngineLoadError, match=r"--kv-cache-dtype int8: op 'layers\.0\.attention' has no CUDA kernel"):
        emulated_runtime(graph, weights, "float16", **SIZES, kv_cache_dtype="int8")


def test_int8_activations_of_a_format_that_their_kernel_does_not_take_are_refused_with_its_reason():
    quant = QuantScheme(6, 16, symmetric=True)
    graph, weights = tiny_model(LLAMA, quant, (*CUDA_PASSES, "int8_activations"))
    with pytest.raises(EngineLoadError, match="no CUDA kernel: the weight has 8-bit integers in groups"):
        emulated_runtime(graph, weights, "float16", **SIZES)
