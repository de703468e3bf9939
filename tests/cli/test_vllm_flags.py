"""vLLM's flags on the command line of ``serve``: honoured, said to have no effect, or refused. Nothing is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from llmctl.checkpoint.methods import METHODS
from llmctl.cli.main import app
from llmctl.cli.vllm_flags import FLAGS, Flag
from llmctl.config import ServeConfig
from llmctl.errors import UsageError
from llmctl.serving import launch
from llmctl.serving.config_check import check_quantization

GIVEN: list[ServeConfig] = []


@pytest.fixture(autouse=True)
def run_server(monkeypatch: pytest.MonkeyPatch) -> None:
    GIVEN.clear()
    monkeypatch.setattr(launch, "run_server", lambda config, _worker: GIVEN.append(config))


def serve(*args: str) -> Result:
    return CliRunner().invoke(app, ["serve", *args])


def words(flag: Flag, value: str) -> list[str]:
    return [flag.names[0]] if flag.metavar is None else [flag.names[0], value]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.names[0])
def test_no_flag_is_passed_over_in_silence(flag: Flag) -> None:
    for value in flag.same or ():
        made = serve("MODEL", *words(flag, value))
        assert (made.exit_code, made.stderr) == (0, "")
    made = serve("MODEL", *words(flag, "7"))
    if flag.same is None:
        assert (made.exit_code, made.stderr) == (0, f"{flag.names[0]} has no effect: {flag.words}\n")
    else:
        assert made.exit_code == 2
        said = " ".join(words(flag, "7"))
        assert made.stderr.startswith(f"error: {said}: not supported: {flag.words} (fix: leave it out")
    assert len(GIVEN) == (1 if flag.same is None else len(flag.same))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--allowed-methods", '["GET","HEAD","POST"]'), ""),
        (("--allowed-methods", '["GET"]'), "(fix: leave it out, or --allowed-methods '[\"*\"]')"),
        (("--allowed-methods", "[" * 100_000), "not supported"),
        (("--allowed-headers", '["X-Mine"]'), "pages of --allowed-origins may send any header"),
        (("--num-gpu-blocks-override", "100"), "the memory says how many there are; --kv-cache-memory SIZE sets it"),
        (("--override-generation-config", "{ }"), ""),
    ],
)
def test_what_is_narrower_or_other_is_refused_in_words(args: tuple[str, str], said: str) -> None:
    made = serve("m", "--allowed-origins", "https://a.example", *args)
    assert (made.exit_code, said in made.stderr) == (2 if said else 0, True), made.stderr


def test_a_line_that_gives_them_as_vllm_has_them() -> None:
    made = serve(
        *("m", "--port", "8000", "--dtype", "auto", "--gpu-memory-utilization", "0.90", "--enforce-eager", "-tp", "1"),
        *("--max-model-len", "64", "--quantization", "gptq", "--tokenizer", "m", "--served-model-name", "a"),
        *("--served-model-name", "b"),
    )
    assert (made.exit_code, made.stderr) == (0, "")
    (found,) = GIVEN
    assert (found.model, found.served_model_name, found.quantization) == ("m", ("a", "b"), "gptq")
    assert (found.gpu_memory_utilization, found.enforce_eager) == (0.9, True)


def test_the_model_by_place_or_by_name() -> None:
    for args in (["m"], ["--model", "m"], ["--served-model-name", "a", "--model", "m"], ["m", "--model", "m"]):
        assert serve(*args).exit_code == 0
    assert [config.model for config in GIVEN] == ["m"] * 4
    for args in (["m", "more"], ["--model", "m", "more"], ["m", "--served-model-name", "a", "more"]):
        made = serve(*args)
        assert (made.exit_code, made.stderr.partition(" (")[0]) == (2, "error: unexpected extra argument")


def test_they_are_keys_of_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("model: m\ntensor-parallel-size: 2\n")
    made = serve("--config", str(tmp_path / "x.yaml"))
    assert "--tensor-parallel-size 2: not supported" in made.stderr


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, "gptq 4-bit"),
        ("GPTQ", "gptq 4-bit"),
        ("gptq_marlin", "gptq 4-bit"),
        ("awq_marlin", "awq 4-bit"),
        ("moe_wna16", "awq 4-bit"),
        ("moe_wna16", "gptq 8-bit"),
        *((method, f"{method} 8-bit") for method in METHODS),
        ("gguf", "gguf 4-bit"),
    ],
)
def test_the_quantization_that_the_model_has(asked: str | None, found: str) -> None:
    check_quantization(asked, found)


@pytest.mark.parametrize(
    ("asked", "found", "said"),
    [
        ("awq", "none", "are not quantized .*llmctl quantize"),
        ("", "none", "are not quantized"),
        ("awq_marlin", "gptq 4-bit", r"are quantized by gptq \(--quantization gptq, or leave it out\)"),
        ("gptq_marlin", "awq 4-bit", "are quantized by awq"),
        ("bitsandbytes", "fp8 8-bit", "are quantized by fp8"),
    ],
)
def test_another_quantization(asked: str, found: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--quantization {asked}: the model's weights {said}"):
        check_quantization(asked, found)
