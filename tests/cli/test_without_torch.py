"""The base install: engines are served, shown and benched without torch and transformers; what needs them says so."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from fixtures import ServerProcess
from in_one_python import answers, run
from tiny_checkpoint import dense_tensors, write_arrays, write_gptq

import llmctl
from llmctl.artifact.builder import build_engine
from llmctl.config import BuildConfig
from llmctl.targets.cpu.toolchain import find_compiler

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""A sitecustomize.py: every Python that finds it, a server's worker as well, has no torch and no transformers."""

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables under which a Python is that of a base install."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(WITHOUT)
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(llmctl.__file__).parents[1])]),
        "LLMCTL_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "80",
    }


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("engine") / "cpu"
    return build_engine(BuildConfig(model=str(tiny_llama), target="cpu", output=str(output)))


def test_the_base_install_is_one(base: dict[str, str]) -> None:
    code = (
        "import importlib.util\nfrom llmctl.extras import missing\nprint(missing('quantize'))\n"
        "print(importlib.util.find_spec('transformers'))\nimport torch"
    )
    done = run(base, "-c", code)
    assert done.stdout.split() == ["torch", "None"]
    assert "No module named 'torch'" in done.stderr


@needs_compiler
def test_an_engine_is_served(base: dict[str, str], engine: Path) -> None:
    with ServerProcess(str(engine), env=base) as server:
        server.wait_ready()
        body = {
            "model": "tiny-llama",
            "messages": [{"role": "user", "content": "x é"}],
            "max_tokens": 8,
            "logprobs": True,
        }
        status, answer = server.post("/v1/chat/completions", body)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 8)
        status, answer = server.post("/v1/embeddings", {"model": "tiny-llama", "input": "x"})
        assert (status, len(answer["data"][0]["embedding"])) == (200, 64)


@needs_compiler
def test_engines_and_headers_are_read(base: dict[str, str], engine: Path, tiny_llama: Path, tmp_path: Path) -> None:
    gptq = write_gptq(tmp_path / "gptq")
    for code, stdout, stderr in answers(
        base,
        ["inspect", str(engine), "--verify", "--ops", "--weights"],
        ["inspect", str(tiny_llama)],
        ["inspect", str(gptq), "--json"],
        ["build", "--model", str(tiny_llama), "--dry-run"],
        ["run", str(engine), "x é", "--max-tokens", "4"],
        ["doctor"],
        ["list", "--json"],
        ["bench", "throughput", "--model", str(engine), "--num-prompts", "2", "--input-len", "8", "--output-len", "4"],
    ):
        assert code == 0, stderr
        assert stdout


def test_what_needs_torch_says_what_to_install(
    base: dict[str, str], tiny_llama: Path, tiny_engine: Path, tmp_path: Path
) -> None:
    model, output = str(tiny_llama), ["--output", str(tmp_path / "output")]
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float16)}
    biased = write_arrays(tmp_path / "biased", dense_tensors() | bias)
    commands = {
        "llmctl quantize needs PyTorch": ["quantize", "--model", model, *output],
        "llmctl quantize compare needs PyTorch": ["quantize", "compare", model],
        "llmctl build needs PyTorch": ["build", "--model", model, *output],
        "llmctl convert needs PyTorch": ["convert", "--model", model, "--to", "gptq", *output],
        "llmctl merge needs PyTorch": ["merge", model, model, *output],
        "llmctl eval needs PyTorch": ["eval", model],
        f"{model} is not an engine yet: building one needs PyTorch": ["run", model, "x"],
        "to fetch it and build an engine of it needs PyTorch": ["bench", "latency", "--model", "demo:smollm2-135m"],
        "running an engine for reference needs PyTorch": ["bench", "latency", "--model", str(tiny_engine)],
        "this needs PyTorch": ["inspect", str(biased)],  # to see whether its biases are zero
    }
    for said, (code, stdout, stderr) in zip(commands, answers(base, *commands.values()), strict=True):
        assert (code, stdout) == (1, ""), stderr
        (line,) = stderr.splitlines()
        assert line.startswith("error: ")
        assert f"{said}, which is not installed (fix: " in line
        assert "[quantize]'; without a GPU" in line
    assert list(tmp_path.iterdir()) == [biased]


def test_a_server_says_so_too(base: dict[str, str], tiny_llama: Path) -> None:
    with ServerProcess(str(tiny_llama), "--target", "cpu", env=base) as server:
        assert server.process.wait(60) == 1
        last = server.output.splitlines()[-1]
        assert last.startswith(f"error: {tiny_llama} is not an engine yet: building one needs PyTorch, which is not")
        assert "Traceback" not in server.output
