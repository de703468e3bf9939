"""Every quantized format on every target: logits of what its owner says that the weights are, and kept at its size."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray
from quantized_files import FORMATS, VOCAB, linear_shapes, write_gguf_pair, write_pair

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import load_engine, read_manifest
from llmctl.artifact.request import EngineRequest
from llmctl.artifact.start import open_runtime
from llmctl.checkpoint.gguf_blocks import BLOCK_FORMATS, BlockFormat, Decoded, SuperBlock
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.safetensors_io import SafetensorsFile
from llmctl.config import BuildConfig
from llmctl.engine.step import SamplingBatch, SequenceSlice, StepPlan
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.cuda import target as cuda_target

GROWTH = {
    "Q2_K": {"cuda": 2.29},
    "Q3_K": {"cuda": 1.46},
    "Q4_K": {"cuda": 1.12},
    "Q5_0": {"cuda": 1.55},
    "Q5_1": {"cuda": 1.5},
    "Q5_K": {"cuda": 1.64},
    "Q6_K": {"cuda": 1.38},
}
"""Engine over checkpoint, by target, where it is more than 1.03 on one: CUDA's kernels read codes of 4 and 8 bits, and
scales and minimums multiplied out in float16."""
COVERING = ("ct-w4-g32-asym", "ct-w8a8-static", "ct-fp8-tensor", "fp8-blocks", "bnb-nf4-double", "Q4_1", "Q4_K", "Q6_K")
"""In the default suite: integers with either zero, minimums, a code book; every shape of scales."""
NAMES = [pytest.param(n, marks=() if n in COVERING else pytest.mark.slow) for n in (*FORMATS, *BLOCK_FORMATS)]
NESTED = [name for name in NAMES if BLOCK_FORMATS.get(name.values[0], BLOCK_FORMATS["Q4_0"]).scheme.nested]
TOKENS = [1, 17, 5, 80, 33, 9, 64, 2, 41, 11, 95, 3, 28, 70, 50, 6, 7, 8]
_FOLDER: list[TemporaryDirectory[str]] = []
_SIZES = EngineRequest(kv_cache_bytes=4 << 20, max_num_seqs=8)


@cache
def pair(name: str) -> tuple[Path, Path, int]:
    """A format's checkpoint, its dense twin, and the bytes of its quantized modules."""
    if not _FOLDER:
        _FOLDER.append(TemporaryDirectory())
    folder = Path(_FOLDER[0].name) / name
    return write_pair(folder, FORMATS[name]) if name in FORMATS else write_gguf_pair(folder, name)


@cache
def engine(model: Path, target: str, dtype: str) -> Path:
    """An engine of a checkpoint."""
    output = model.parent / f"{model.name}-{target.partition(':')[0]}-{dtype}"
    build_engine(BuildConfig(model=str(model), output=str(output), target=target, dtype=dtype))
    return output


@cache
def logprobs(model: Path, target: str, dtype: str, rows: int = len(TOKENS)) -> NDArray[np.float32]:
    """Log-probabilities [rows, VOCAB] after each of the first tokens, in one step."""
    runtime = open_runtime(load_engine(engine(model, target, dtype), _SIZES), threads=2)
    plan = StepPlan((SequenceSlice("r", TOKENS[:rows], 0, [0, 1], False, TOKENS[:rows], VOCAB),))
    none = SamplingBatch(np.zeros(0, np.float32), np.zeros(0, np.uint64), np.zeros(0, np.int64))
    scores = runtime.execute(plan, none).result().scores["r"]
    found = np.zeros((rows, VOCAB), np.float32)
    np.put_along_axis(found, scores.top_ids, scores.top_logprobs, 1)
    return found


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
on_targets = pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=needs_compiler)])


@pytest.mark.parametrize("name", [*FORMATS, *BLOCK_FORMATS])
def test_weights_are_what_the_format_means(name: str) -> None:
    quantized, dense, _ = pair(name)
    found, meant = open_checkpoint(quantized), open_checkpoint(dense)
    for module, shape in linear_shapes().items():
        weight = found.weight(f"{module}.weight")
        assert isinstance(weight, QuantizedWeight)
        assert weight.scheme == found.describe(f"{module}.weight").quant
        assert weight.shape == shape
        np.testing.assert_allclose(weight.dequantize(), meant.weight(f"{module}.weight"), rtol=3e-7, atol=0)


@on_targets
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dequantized_weights(name: str, target: str) -> None:
    quantized, dense, _ = pair(name)
    expected = logprobs(dense, "reference", "float32")
    for rows in (len(TOKENS), 1):
        found = logprobs(quantized, target, "float32", rows)
        assert np.abs(found - expected[:rows]).max() < 1e-4


def linear_bytes(folder: Path) -> int:
    """Bytes that an engine's quantized weights take; it need not be one that this machine can run."""
    weights = read_manifest(folder).graph.weights
    names = tuple(f"{name}." for name, weight in weights.items() if weight.quant is not None)
    files = [SafetensorsFile(path) for path in folder.glob("*.safetensors")]
    return sum(file.plane(name).data.nbytes for file in files for name in file.tensors if name.startswith(names))


@pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=needs_compiler), "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_is_as_large_as_the_checkpoint(name: str, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _, size = pair(name)
    monkeypatch.setattr(cuda_target, "compile_modules", lambda *_args, **_options: [])
    made = engine(
        quantized, {"cuda": "cuda:sm_90"}.get(target, target), "float32" if target == "reference" else "bfloat16"
    )
    found = linear_bytes(made)
    assert size * 0.9 < found <= GROWTH.get(name, {}).get(target, 1.03) * size


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_cpu_kernels_read_what_was_packed(name: str) -> None:
    """bfloat16 engines round activations: nearer to the dequantized weights than a step of a code is to nothing."""
    quantized, dense, _ = pair(name)
    expected = logprobs(dense, "reference", "float32")
    plain = np.abs(logprobs(dense, "cpu", "bfloat16") - expected).max()
    error = np.abs(logprobs(quantized, "cpu", "bfloat16") - expected).max()
    assert error < max(0.1, 4 * plain)


@on_targets
@pytest.mark.parametrize("name", NESTED)
def test_nested_scales_give_the_bits_of_scales_multiplied_out(
    name: str, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    quantized = pair(name)[0]
    found = logprobs(quantized, target, "bfloat16")
    kept = BLOCK_FORMATS[name]

    def plain(blocks: NDArray[np.uint8]) -> Decoded:
        codes, *nested = kept.decode(blocks)
        zero = np.float32(kept.scheme.nested_zero)
        floats = [(n.codes - zero) * n.super_scale.astype(np.float32) for n in nested if isinstance(n, SuperBlock)]
        return codes, floats[0], floats[1] if kept.scheme.minimum else None

    monkeypatch.setitem(
        cast("dict[str, BlockFormat]", BLOCK_FORMATS),
        name,
        BlockFormat(replace(kept.scheme, nested=0, nested_bits=8), "F32", plain),
    )
    copy = tmp_path / quantized.name
    copy.write_bytes(quantized.read_bytes())
    expected = logprobs(copy, target, "bfloat16")
    assert linear_bytes(engine(copy, target, "bfloat16")) > 1.04 * linear_bytes(engine(quantized, target, "bfloat16"))
    assert found.tobytes() == expected.tobytes()
