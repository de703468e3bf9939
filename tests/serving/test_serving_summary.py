"""What serve shows when it is ready: sizes as the runtime has them, and on a GPU what takes how much. A faked GPU."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
from engine.fake_runtime import FakeRuntime
from fixtures import make_tiny_llama

from llmctl.artifact.builder import build_engine
from llmctl.artifact.loader import LoadedEngine
from llmctl.artifact.start import start_engine
from llmctl.config import BuildConfig, EngineOptions, ServeConfig
from llmctl.serving.context import Model
from llmctl.serving.engine_loop import _info
from llmctl.serving.sampling_defaults import SamplingDefaults
from llmctl.serving.summary import print_summary
from llmctl.serving.tools.support import ToolSupport
from llmctl.serving.wire import EngineInfo, decode_event, encode
from llmctl.targets.cuda import target as cuda
from llmctl.targets.cuda.device import CudaDevice


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, on a machine with a GPU of 16 GiB whose runtime has 70 blocks, whatever was planned."""
    monkeypatch.setattr(cuda.CudaTarget, "compile", lambda *_, **__: [])
    monkeypatch.setattr(cuda.CudaTarget, "source_hashes", lambda *_: {})
    monkeypatch.setattr(cuda, "cuda_device", lambda: CudaDevice((9, 0), (13, 0), 2**34))
    monkeypatch.setattr(cuda, "held_bytes", lambda _: 0)
    monkeypatch.setattr(cuda, "missing_here", lambda _: None)
    module = types.ModuleType("llmctl.targets.cuda.opening")

    def opened(engine: LoadedEngine) -> FakeRuntime:
        return FakeRuntime(num_blocks=70, block_size=engine.sizes.block_size)

    module.open_cuda_runtime = opened  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return make_tiny_llama(tmp_path / "tiny")


def info_of(model: Path, target: str, options: EngineOptions) -> EngineInfo:
    engine = build_engine(BuildConfig(str(model), str(model.with_name(target)), target=target))
    started = start_engine(engine, options)
    return cast(EngineInfo, decode_event(encode(_info(started.loaded, started.engine))))


def shown(
    info: EngineInfo,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    config: ServeConfig = ServeConfig(),
    engine: str = "e",
) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    intake = SimpleNamespace(has_chat_template=False, tools=ToolSupport())
    defaults = SamplingDefaults({"top_p": 0.9}, "its model card")
    print_summary(config, Model("tiny", intake, info, defaults), Path(engine), 1.0, keyed=False)  # type: ignore[arg-type]
    return capsys.readouterr().err


def test_a_gpus_memory_is_itemised_as_the_runtime_has_it(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = info_of(model, "cuda", EngineOptions(kv_cache_dtype="int8"))
    assert (info.num_blocks, info.max_num_seqs, info.max_num_batched_tokens) == (70, 256, 2048)
    assert info.kv_cache_dtype == "int8"
    text = shown(info, capsys, monkeypatch)
    rows = {" ".join(line.split()[:-1]): line.split()[-1] for line in text.splitlines() if line.split()}
    assert rows["tokens of it"] == str(70 * info.block_size)
    assert "up to 256 requests, 2048 tokens a step" in text
    assert "top_p 0.9 (its model card)" in text
    assert "budget: 0.9 of the GPU's 16.0 GiB" in text
    assert info.kv_cache_bytes % info.num_blocks == 0
    table = [line for line in text.splitlines() if "try: " not in line and not line.startswith(("│", "╭", "╰"))]
    assert max(map(len, table)) <= 80


def test_a_cpus_is_not(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    info = info_of(model, "reference", EngineOptions(kv_cache_memory="1MiB"))
    assert info.memory[0][0] == "memory"  # which the page shows
    assert (info.max_num_seqs, info.max_num_batched_tokens) == (64, 512)
    assert "device context" not in shown(info, capsys, monkeypatch)


def test_kernels_that_the_system_refuses_are_shown(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = info_of(model, "reference", EngineOptions())
    assert "kernels" not in shown(info, capsys, monkeypatch)
    refused = msgspec.structs.replace(info, kernels="avx512bf16 (AMX: refused)")
    assert "kernels   avx512bf16 (AMX: refused)" in shown(refused, capsys, monkeypatch)


def test_it_says_where_page_api_and_metrics_are_and_cuts_nothing(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = info_of(model, "reference", EngineOptions())
    engine = "/a/folder/with[brackets]/" + "long" * 30
    text = shown(info, capsys, monkeypatch, engine=engine)
    assert f"engine: {engine}" in text.splitlines()  # whole, to be copied
    assert "…" not in text
    for address in ("http://127.0.0.1:8000/, to chat", "http://127.0.0.1:8000/docs", "http://127.0.0.1:8000/metrics"):
        assert address in text
    without = shown(info, capsys, monkeypatch, ServeConfig(ui=False))
    assert "to chat" not in without
    assert "http://127.0.0.1:8000/openapi.json" in without
