"""``llmctl build`` and ``llmctl inspect`` as a user runs them: output, exit codes, one-line errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fixtures import share_compiled_kernels
from tiny_checkpoint import dense_tensors, write_arrays, write_dense, write_gptq
from typer.testing import CliRunner, Result

from llmctl.artifact.loader import read_manifest
from llmctl.cli.main import app
from llmctl.errors import CompileError
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.cuda.nvrtc import load_nvrtc

CONFIGS = Path(__file__).parents[2] / "configs" / "build"
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LLMCTL_CACHE", str(share_compiled_kernels(tmp_path_factory.getbasetemp() / "cache")))
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*args: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, result.output
        return result

    return invoke


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_gptq(tmp_path / "tiny")


def one_error_line(result: Result) -> str:
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
def test_build_and_inspect(run: Run, model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    built = run("build", "--model", model, "--output", engine, "--dtype", "float32")
    assert built.stdout.startswith(f"{engine}: ")
    assert "weights 100%" in built.stderr
    shown = run("inspect", engine, "--ops", "--weights", "--verify").stdout
    for text in (
        "tiny",
        "cpu",
        "float32",
        "gptq, 4 bits, groups of 32, asymmetric; dense: lm_head.weight",
        "add_rms_norm",
    ):
        assert text in shown
    assert "layers.0.qkv_proj.weight.tiles" in shown


def test_json_documents(run: Run, model: Path, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    built = json.loads(run("build", "--model", model, "--output", engine, "--json").stdout)
    shown = json.loads(run("inspect", engine, "--json").stdout)
    assert built["checksum"] == shown["checksum"]
    assert built["bytes"] == sum(record["size"] for record in shown["files"].values())
    assert shown["runs_here"] == "yes"
    assert shown["graph"]["ops"]["attention"] == 2
    assert len(shown["ops"]) == sum(shown["graph"]["ops"].values())


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize(
    "options",
    [
        "--lm-head int4 --kv-cache-dtype int8 --passes fuse_rope_kv --passes merge_qkv",
        "--lm-head dense --passes none",
        "--dtype float32 --block-size 32",
        "--target reference --dtype float16 --kv-cache-dtype float32 --max-model-len 99",
    ],
)
def test_the_rebuild_command_makes_the_same_engine(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    monkeypatch.chdir(model.parent)
    run("build", "--model", "tiny", "--output", "first", "--eval-text", "none", *options.split())
    first = read_manifest(Path("first"))
    words = first.rebuild_command("second").split()
    assert words[0] == "llmctl"
    run(*words[1:], "--eval-text", "none")
    assert read_manifest(Path("second")) == first


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
def test_the_effect_of_the_head(run: Run, model: Path, tmp_path: Path) -> None:
    build = ("build", "--model", model, "--output", tmp_path / "engine")
    table = run(*build).stdout
    for text in ("output head, perplexity on", "dense", "int8 (built)", "int4", "%"):
        assert text in table
    (tmp_path / "text.txt").write_text("one two three")
    found = json.loads(run(*build, "--lm-head", "int4", "--eval-text", tmp_path / "text.txt", "--json").stdout)[
        "lm_head"
    ]
    assert (found["chosen"], found["tokens"]) == ("int4", len("one two three"))
    assert [h["lm_head"] for h in found["heads"]] == ["dense", "int8", "int4"]
    assert all(h["perplexity"] > 1 for h in found["heads"])
    assert found["heads"][0]["change"] == 0
    assert json.loads(run(*build, "--eval-text", "none", "--json").stdout)["lm_head"] is None
    assert "output head" not in run(*build, "--dtype", "float32").stdout


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
def test_an_effect_that_cannot_be_measured_is_said(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    built = run("build", "--model", model, "--output", tmp_path / "engine", "--eval-text", tmp_path / "text.txt")
    assert "warning: the effect of --lm-head is not measured: the text has no two tokens" in built.stderr
    assert (tmp_path / "engine" / "engine.json").is_file()


def test_what_is_wrong_is_found_before_the_work(run: Run, model: Path, tmp_path: Path) -> None:
    build = ("build", "--model", model, "--output", tmp_path / "engine")
    line = one_error_line(run(*build, "--eval-text", tmp_path / "absent", code=2))
    assert "--eval-text" in line
    assert "No such file" in line
    (model / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is not understood" in one_error_line(run(*build, code=1))
    (model / "tokenizer.json").unlink()
    assert "no tokenizer.json" in one_error_line(run(*build, code=1))
    assert not (tmp_path / "engine").exists()


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
def test_inspect_a_checkpoint(run: Run, model: Path) -> None:
    shown = json.loads(run("inspect", model, "--json").stdout)
    assert shown["kind"].startswith("model")
    assert shown["quantization"]["bits"] == 4
    assert {plane["name"] for plane in shown["weights"]} >= {
        "layers.1.down_proj.weight.tile_zeros",
        "final_norm.weight",
    }


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
def test_inspect_names_what_nothing_reads(run: Run, tmp_path: Path) -> None:
    tensors = dense_tensors() | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8) for i in range(2)}
    model = write_arrays(tmp_path / "model", tensors)
    (unused,) = json.loads(run("inspect", model, "--json").stdout)["unused"]
    assert unused["names"] == [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)]
    assert unused["reason"].startswith("rotary frequencies")
    shown = run("inspect", model).stdout
    assert "tensors of the checkpoint that nothing reads" in shown
    assert "'model.layers.0.self_attn.rotary_emb.inv_freq', 'model.layers.1.self_attn.rotary_emb.inv_freq'" in shown


@pytest.mark.parametrize("quantized", [True, False])
def test_inspect_a_model_of_an_unknown_family(run: Run, tmp_path: Path, quantized: bool) -> None:
    model = (write_gptq if quantized else write_dense)(tmp_path / "alien")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    document = json.loads(run("inspect", model, "--json").stdout)
    assert "model_type 'mamba' is not supported" in document["not_built"]
    assert sum(row["count"] for row in document["stored"]) == len(document["weights"]) > 10
    assert {row["quantization"]["method"] for row in document["stored"]} == (
        {"none", "gptq"} if quantized else {"none"}
    )
    assert "tokens and those added" in document["tokenizer"]
    shown = run("inspect", model, "--weights").stdout
    for text in ("not built", "mamba", "model.layers.1.mlp.down_proj.weight"):
        assert text in shown
    assert ("gptq, 4 bits, groups of 32" in shown) is quantized
    (model / "tokenizer.json").write_text("[]")
    assert "tokenizer.json is not understood" in json.loads(run("inspect", model, "--json").stdout)["tokenizer"]


def test_inspect_of_what_cannot_be_read_ends_in_one_line(run: Run, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "aqlm"
    (model / "config.json").write_text(json.dumps(config))
    assert "AQLM" in one_error_line(run("inspect", model, code=1))


def test_a_tensor_that_would_be_left_out(run: Run, tmp_path: Path) -> None:
    bias = {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float16)}
    model = write_arrays(tmp_path / "model", dense_tensors() | bias)
    commands = [("build", "--target", "reference"), ("quantize", "--method", "rtn")]
    for command, *options in commands:
        result = run(command, "--model", model, "--output", tmp_path / "out", *options, code=1)
        line = one_error_line(result)
        assert "biases that are not zero and that config.json does not declare" in line
        assert "'model.layers.0.self_attn.q_proj.bias'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_dry_run(run: Run, model: Path, tmp_path: Path) -> None:
    arguments = ("build", "--model", model, "--output", tmp_path / "engine", "--dry-run", "--memory-budget", "1GiB")
    assert "largest --max-model-len" in run(*arguments).stdout
    plan = json.loads(run(*arguments, "--json", "--dtype", "float32").stdout)
    assert plan["kv_bytes_per_token"] == 2 * 2 * 32 * 4
    assert plan["fits"]
    assert not (tmp_path / "engine").exists()
    short = json.loads(run(*arguments[:-1], "500KiB", "--json", "--dtype", "float32", code=1).stdout)
    assert not short["fits"]
    refused = run(*arguments[:-1], "400KiB", code=1)
    assert "largest --max-model-len" in refused.stdout
    (line,) = refused.stderr.splitlines()
    assert line.startswith("error: does not fit: memory: expected at most 400.0 KiB (the budget that was given)")


def test_a_build_keeps_to_its_memory_budget(run: Run, model: Path, tmp_path: Path) -> None:
    arguments = ("build", "--model", model, "--output", tmp_path / "engine", "--target", "reference")
    line = one_error_line(run(*arguments, "--memory-budget", "400KiB", code=1))
    assert line.startswith("error: does not fit: memory: expected at most 400.0 KiB (the budget that was given)")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    run(*arguments, "--memory-budget", "1GiB", "--eval-text", "none")
    assert (tmp_path / "engine" / "engine.json").is_file()


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (("build",), 2, "--model is required"),
        (("build", "--model", "tiny"), 2, "--output: the folder to write is missing (fix: --output ./engine)"),
        (("build", "--model", "./nothing", "--output", "e"), 2, "no such file or folder"),
        (("build", "--model", "tiny", "--output", "e", "--target", "tpu"), 2, "--target: expected one of"),
        (("build", "--model", "tiny", "--output", "tiny"), 2, "is not an llmctl engine; it is left alone"),
        (("build", "--model", "broken", "--output", "e"), 1, "truncated"),
        (("build", "--model", "alien", "--output", "e"), 1, "mamba"),
        (("inspect", "./nothing"), 2, "no such file or folder"),
        (("inspect", "engine"), 1, "expected a file of"),
    ],
)
def test_errors(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int, text: str
) -> None:
    monkeypatch.chdir(model.parent)
    broken = write_dense(Path("broken")) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    alien = write_dense(Path("alien")) / "config.json"
    alien.write_text(json.dumps({**json.loads(alien.read_text()), "model_type": "mamba"}))
    run("build", "--model", "tiny", "--output", "engine")
    (Path("engine") / "tokenizer.json").unlink()
    before = sorted(Path().rglob("*"))
    assert text in one_error_line(run(*args, code=code))
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "recipe",
    [
        # Every CUDA kernel for two architectures is compiled: make test-kernels runs it.
        pytest.param(path, marks=pytest.mark.slow if "cuda" in path.stem else (), id=path.stem)
        for path in sorted(CONFIGS.glob("*.yaml"))
    ],
)
def test_recipes(run: Run, tmp_path: Path, recipe: Path) -> None:
    model = write_gptq(tmp_path / "tiny")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 8192}))
    if "cuda" in recipe.stem:
        try:
            load_nvrtc()
        except CompileError as error:
            pytest.skip(str(error))
    engine = tmp_path / "engine"
    run("build", "--config", recipe, "--model", model, "--output", engine)
    shown = json.loads(run("inspect", engine, "--verify", "--json").stdout)
    if "cuda" in recipe.stem:
        kernels = {row["kernel"]: row for row in shown["kernels"]}
        made = {Path(name).parent.name for name in shown["modules"]}
        assert made == {"sm_80", "sm_90", "compute_80"}
        assert shown["modules"]["kernels/sm_90/norm.cubin"]["resources"]
        assert {"rms_norm", "rope_kv", "embed", "sample"} <= set(kernels)
        assert any(row["refused"] for row in shown["kernels"])
        again = tmp_path / "again"
        run("build", "--config", recipe, "--model", model, "--output", again)
        assert (again / "engine.json").read_bytes() == (engine / "engine.json").read_bytes()
