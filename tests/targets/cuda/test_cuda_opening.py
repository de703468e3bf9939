"""Opening an engine on a GPU, as far as that needs none: which modules, how many KV blocks, how weights travel."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from meta_runtime import meta_planes
from tiny_models import FAMILIES, QUANTS, tiny_graph

from llmctl.errors import EngineLoadError
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.graph.kv_groups import KVGroup
from llmctl.targets.base import BuildOptions, RuntimeSizes
from llmctl.targets.cuda import opening, weights
from llmctl.targets.cuda.compile import PTX_FALLBACK
from llmctl.targets.cuda.device import CudaDevice
from llmctl.targets.cuda.ops import PackedWeight
from llmctl.targets.cuda.target import CUDA_PASSES
from llmctl.targets.planes import WeightPlane

GIB, MIB = 2**30, 2**20
GRAPH = tiny_graph(FAMILIES["llama"], QUANTS["w4"], CUDA_PASSES)
OPTIONS = BuildOptions("float16", 128, 16, "int8", GRAPH.passes)
BLOCK_BYTES = 16 * 2 * 2 * (64 + 4)  # tokens, layers, keys and values of one head, and its scale


@dataclass
class Engine:
    """What a runtime is opened from."""

    path: Path = Path("engine")
    graph: Graph = GRAPH
    options: BuildOptions = OPTIONS
    weights: dict[str, WeightPlane] = field(default_factory=dict)
    sizes: RuntimeSizes = RuntimeSizes(1000, 16, 128, 512, 8)  # noqa: RUF009 - frozen


# -- modules -------------------------------------------------------------------------------------------------------

SOURCES = {
    "attention_combine", "attention_decode_d64", "attention_prefill_d64", "dequantize", "elementwise", "logits", "norm",
    "rope_kv", "sampling", "w4a16_gemm", "w4a16_stream",
}  # fmt: skip


def _kernels(folder: Path, *archs: str) -> None:
    for arch in archs:
        (folder / "kernels" / arch).mkdir(parents=True)
        for stem in SOURCES:
            suffix = "ptx" if arch.startswith("compute_") else "cubin"
            (folder / "kernels" / arch / f"{stem}.{suffix}").touch()


@pytest.mark.parametrize(
    ("capability", "arch", "suffix"),
    [((9, 0), "sm_90", "cubin"), ((8, 9), "sm_80", "cubin"), ((12, 0), PTX_FALLBACK, "ptx")],
)
def test_modules_are_those_for_the_device(
    capability: tuple[int, int], arch: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "cuda_device", lambda: CudaDevice(capability, (13, 0), 80 * GIB))
    _kernels(tmp_path, "sm_80", "sm_90", PTX_FALLBACK)
    found = opening.module_files(Engine(tmp_path))
    assert found == {f"{stem}.cu": tmp_path / "kernels" / arch / f"{stem}.{suffix}" for stem in SOURCES}


def test_a_module_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "cuda_device", lambda: CudaDevice((9, 0), (13, 0), 80 * GIB))
    _kernels(tmp_path, "sm_90")
    (tmp_path / "kernels/sm_90/rope_kv.cubin").unlink()
    with pytest.raises(EngineLoadError, match=r"expected kernels/sm_90/rope_kv\.cubin, found none"):
        opening.module_files(Engine(tmp_path))


# -- the KV cache --------------------------------------------------------------------------------------------------


class Device:
    """Memory of which ``used`` bytes are taken besides what a probe of the runtime takes while it is open."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: int, used: int, probe: int) -> None:
        self.total, self.used, self.probe, self.measured = total, used, probe, True
        self.log: list[Any] = []
        device = self

        class Probe:
            """A runtime."""

            def __init__(self, *given: Any) -> None:
                _, _, _, sizes, _ = given
                device.used += device.probe
                device.log.append(sizes)

            def run_largest(self) -> bool:
                device.log.append("largest")
                return device.measured

            def close(self) -> None:
                device.used -= device.probe
                device.log.append("closed")

        monkeypatch.setattr(opening, "CudaRuntime", Probe)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("done"))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (self.total - self.used, self.total))

    def fitted(self, **sizes: Any) -> RuntimeSizes:
        """The sizes of an engine there."""
        made = RuntimeSizes(**{"num_blocks": 1000, "block_size": 16, "max_model_len": 128,
                               "max_num_batched_tokens": 512, "max_num_seqs": 8, **sizes})  # fmt: skip
        return opening.fitted(Engine(sizes=made), {}, SimpleNamespace())  # type: ignore[arg-type]


def test_as_many_blocks_as_planned_where_there_is_room(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(monkeypatch, 10 * GIB, 2 * GIB, GIB)
    with caplog.at_level(logging.WARNING):
        assert device.fitted(num_blocks=1000).num_blocks == 1000
    assert not caplog.records
    probed, *rest = device.log
    assert rest == ["largest", "done", "closed"]
    assert (probed.num_blocks, probed.enforce_eager, probed.max_num_seqs) == (1, True, 8)
    assert device.used == 2 * GIB


def test_a_step_that_cannot_be_measured_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(monkeypatch, 10 * GIB, 2 * GIB, GIB)
    device.measured = False
    with caplog.at_level(logging.WARNING):
        device.fitted()
    assert "the KV cache is sized without a measured step" in caplog.text


def test_a_probe_that_fails_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 10 * GIB, 2 * GIB, GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        device.fitted()
    assert device.used == 2 * GIB


def test_fewer_where_there_is_not(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What others hold, what the probe held, and a margin are left alone, of the share that may be used."""
    device = Device(monkeypatch, 10 * GIB, 2 * GIB, GIB)
    room = 8 * GIB - 3 * GIB - 256 * MIB
    with caplog.at_level(logging.WARNING):
        found = device.fitted(num_blocks=10**7, gpu_memory_utilization=0.8, enforce_eager=False)
    assert found.num_blocks == room // BLOCK_BYTES
    assert not found.enforce_eager
    assert f"{found.num_blocks} of the 10000000 planned blocks fit: 7.0 of 10.0 GiB are free" in caplog.text


@pytest.mark.parametrize("blocks", [7, 1])
def test_no_room_for_one_sequence(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    used = 9 * GIB - 256 * MIB - GIB - blocks * BLOCK_BYTES
    device = Device(monkeypatch, 10 * GIB, used, GIB)
    with pytest.raises(EngineLoadError, match=f"expected room for 128 tokens, found {blocks} blocks of 16") as raised:
        device.fitted()
    assert raised.value.fix == f"--max-model-len {16 * blocks}"
    assert device.log[-1] == "closed"
    assert Device(monkeypatch, 10 * GIB, used, GIB).fitted(max_model_len=16 * blocks).num_blocks == blocks


def test_groups_that_let_go_of_blocks_fit_where_a_whole_context_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is of one layer then; a window of 20 and steps of 24 hold four blocks of it, whatever the length."""
    groups = (KVGroup(0, (0,)), KVGroup(20, (1,)))
    used, changes = 9 * GIB - 256 * MIB - GIB, {"max_num_batched_tokens": 24, "kv_groups": groups}
    enough = Device(monkeypatch, 10 * GIB, used - 12 * BLOCK_BYTES // 2, GIB)
    assert enough.fitted(**changes).num_blocks == 8 + 4
    assert enough.log[0].kv_groups == groups
    short = Device(monkeypatch, 10 * GIB, used - 11 * BLOCK_BYTES // 2, GIB)
    with pytest.raises(EngineLoadError, match="expected room for 128 tokens, found 11 blocks of 16") as raised:
        short.fitted(**changes)
    assert raised.value.fix == "--max-model-len 112"
    with pytest.raises(EngineLoadError, match="found 6 blocks of 16"):
        Device(monkeypatch, 10 * GIB, used - 12 * BLOCK_BYTES // 2, GIB).fitted()


def test_no_room_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, 10 * GIB, 9 * GIB, GIB // 2)
    with pytest.raises(EngineLoadError, match="found 0 blocks of 16") as raised:
        device.fitted()
    assert raised.value.fix == "free memory on the device"


# -- weights -------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 40_000), max_size=8), st.sampled_from([4096, 5000, 16384]))
def test_portions_have_every_byte_once(sizes: list[int], room: int) -> None:
    planes = {f"p{i}": WeightPlane("U8", (n,), np.zeros(n, np.uint8)) for i, n in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_STAGE_BYTES", room)
        portions = list(weights._portions(planes))
    seen = {name: np.zeros(plane.shape, int) for name, plane in planes.items()}
    for portion in portions:
        assert 0 < sum(size for *_, size in portion) <= room
        for name, start, size in portion:
            assert size > 0
            seen[name][start : start + size] += 1
    assert all((counts == 1).all() for counts in seen.values())
    assert len(portions) <= sum(sizes) // max(1, room - 4096) + 1


def test_portions_count_bytes_whatever_the_dtype() -> None:
    planes = {"a": WeightPlane("BF16", (3, 5), np.zeros((3, 5), np.uint16)),
              "b": WeightPlane("F32", (2,), np.zeros(2, np.float32))}  # fmt: skip
    assert list(weights._portions(planes)) == [[("a", 0, 30), ("b", 0, 8)]]


@pytest.mark.parametrize("size", [1, 100, 3 * MIB + 17, 20 * MIB])
def test_a_buffer_is_filled_by_several_readers(size: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    to = np.zeros(size, np.uint8)
    with ThreadPoolExecutor(weights._READERS) as readers:
        for job in weights._fill(readers, to, source):
            job.result()
    assert np.array_equal(to, source)


def test_weights_are_put_together_as_kernels_take_them() -> None:
    planes = meta_planes(GRAPH, OPTIONS)
    found = weights.device_weights(GRAPH, planes)
    assert found[""] is None
    assert found.keys() == {"", *GRAPH.weights}
    for name, weight in GRAPH.weights.items():
        if weight.quant is None:
            assert found[name] is planes[name]
        else:
            packed = found[name]
            assert isinstance(packed, PackedWeight)
            assert packed.planes["tiles"] is planes[f"{name}.tiles"]
            assert packed.planes.keys() == set(packed.format.planes())


def test_weights_that_no_kernel_takes_are_left_out() -> None:
    graph = tiny_graph(FAMILIES["llama"], QuantScheme(4, 48, symmetric=True), CUDA_PASSES)
    found = weights.device_weights(graph, meta_planes(graph, OPTIONS))
    assert {name for name, weight in graph.weights.items() if weight.quant is not None}.isdisjoint(found)
