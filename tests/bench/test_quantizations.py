import json
from dataclasses import replace
from pathlib import Path

import pytest
from random_models import CALIBRATION_TEXT, write_small_llama
from typer.testing import CliRunner

from llmctl.bench import quantizations
from llmctl.bench.config import CompareConfig
from llmctl.bench.progress import Progress
from llmctl.bench.quantizations import Candidate, Comparison, Shown, best, choose_method, compare
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.cli.main import app
from llmctl.cli.quantize_compare import _print_table
from llmctl.config import EvalConfig, QuantizeConfig
from llmctl.errors import LlmctlError, UsageError
from llmctl.quantize.driver import Silent

SHOWN = Shown(Silent(), lambda *_: None, Progress)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> CompareConfig:
    text = tmp_path / "calib.txt"
    text.write_text(CALIBRATION_TEXT)
    base = QuantizeConfig(
        model=str(model), group_size=32, symmetric=True, calib=str(text), calib_samples=4, calib_length=32
    )
    return CompareConfig(base, ("rtn", "gptq"), (4, 8), text=str(text), context=64, windows=2, target="reference")


def candidate(method: str, size: int, kl: float) -> Candidate:
    return Candidate(method, 4, "gptq", size, 4.5, kl, None, 0.0, 1.0, None, 1.0)


MADE = [candidate("original", 9, 0.0), candidate("rtn", 4, 0.3), candidate("awq", 4, 0.1), candidate("gptq", 8, 0.01)]


@pytest.mark.parametrize(
    ("limits", "winner"),
    [
        ({"max_kl": 0.2}, 2),
        ({"max_kl": 0.5}, 2),
        ({"max_kl": 0.05}, 3),
        ({"max_size": "8"}, 3),
        ({"max_size": "5"}, 2),
        ({"max_size": "8", "max_kl": 0.5}, 2),
        ({"max_size": "3"}, None),
        ({"max_size": "5", "max_kl": 0.05}, None),
        ({"target_bpw": 4.0}, 3),
    ],
    ids=str,
)
def test_the_smallest_near_enough_or_the_nearest_small_enough(limits: dict[str, object], winner: int | None) -> None:
    assert best(MADE, QuantizeConfig(**limits)) == winner  # type: ignore[arg-type]


@pytest.mark.slow
def test_all_are_measured_and_the_winner_is_kept(config: CompareConfig, tmp_path: Path) -> None:
    output = tmp_path / "kept"
    found = compare(replace(config, base=replace(config.base, output=str(output), max_size="1GiB")), SHOWN)
    assert [(c.method, c.bits) for c in found.candidates] == [
        ("original", 16), ("rtn", 4), ("gptq", 4), ("rtn", 8), ("gptq", 8),
    ]  # fmt: skip
    assert all(c.decode_tokens_per_second is not None and c.decode_tokens_per_second > 0 for c in found.candidates)
    rtn4, rtn8 = found.candidates[1], found.candidates[3]
    assert rtn4.size < rtn8.size < found.candidates[0].size
    assert rtn4.kl > 50 * rtn8.kl > 0
    assert found.winner is not None
    kept = found.candidates[found.winner]
    assert kept.kl == min(c.kl for c in found.candidates[1:])
    stored = open_checkpoint(output).describe("model.layers.0.mlp.up_proj.weight").quant
    assert stored is not None
    assert stored.bits == kept.bits == 8
    assert (output / "model.safetensors").stat().st_size == kept.size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "kept"]


@pytest.mark.slow
def test_without_limits_nothing_is_kept(config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lying: list[int] = []

    class Counting(Silent):
        def note(self, text: str) -> None:  # noqa: ARG002
            lying.append(len(list(tmp_path.glob(".llmctl-compare-*/*/config.json"))))

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shown = replace(SHOWN, quantizing=Counting())
    found = compare(replace(config, methods=("rtn", "awq"), bits=(3, 4)), shown)
    assert found.winner is None
    assert set(lying) == {0}
    assert len(found.candidates) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["calib.txt"]


@pytest.mark.slow
def test_what_a_format_does_not_hold_is_noted(config: CompareConfig) -> None:
    base = replace(config.base, format="compressed-tensors")
    found = compare(replace(config, base=base, methods=("rtn",), bits=(3, 4)), SHOWN)
    assert list(found.refused) == ["rtn, 3 bits"]
    assert [c.bits for c in found.candidates] == [16, 4]
    with pytest.raises(UsageError, match="read at 4 and 8 bits"):
        compare(replace(config, base=base, methods=("rtn",), bits=(3,)), SHOWN)


@pytest.mark.slow
def test_auto_stops_at_the_first_bits_that_will_do(config: CompareConfig, tmp_path: Path) -> None:
    base = replace(config.base, method="auto", output=str(tmp_path / "small"), max_kl=10.0)
    report, found = choose_method(replace(config, base=base), SHOWN)
    assert [c.bits for c in found.candidates] == [4, 4]
    assert report.output == base.output
    assert report.size_after == min(c.size for c in found.candidates)
    base = replace(config.base, method="auto", output=str(tmp_path / "near"), max_size="1GiB")
    _, found = choose_method(replace(config, base=base), SHOWN)
    assert [c.bits for c in found.candidates] == [8, 8]
    base = replace(config.base, method="auto", output=str(tmp_path / "mixed"), target_bpw=4.5)
    report, found = choose_method(replace(config, base=base, bits=None), SHOWN)
    assert [c.bits for c in found.candidates] == [None, None]
    assert report.bits_per_weight <= 4.5
    assert {path.name for path in tmp_path.iterdir()} == {"calib.txt", "small", "near", "mixed"}


def test_int8_activations_are_measured_with(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[EvalConfig] = []
    inner = quantizations.evaluate
    monkeypatch.setattr(quantizations, "evaluate", lambda one, show: seen.append(one) or inner(one, show))
    base = replace(config.base, output=str(tmp_path / "out"), group_size=-1, max_kl=10.0)
    for format in ("compressed-tensors-w8a8", "compressed-tensors"):
        one = replace(base, format=format, output=str(tmp_path / format))
        choose_method(replace(config, base=one, methods=("rtn",), bits=(8,)), SHOWN)
    assert [one.activations for one in seen] == ["int8", "auto"]


def test_the_widest_table_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    wide = replace(
        candidate("awq+gptq", 13_000 << 20, 12.3456),
        bits=None,
        kl_error=0.05,
        delta_nll=-12.3456,
        decode_tokens_per_second=12345.0,
        seconds=12345.0,
        front=True,
    )
    found = Comparison("m", "cpu", {}, (wide,), {"rtn, 3 bits": "why not " * 20}, 0, "")
    _print_table(found)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for said in ("awq+gptq mixed *", "13000.0", "12.3456 ± 0.05", "-12.3456", "12345"):
        assert said in out
    assert "best within the limits: awq+gptq, 4.50 bits a weight; --output keeps it" in out
    _print_table(replace(found, output="./best"))
    assert "kept awq+gptq, 4.50 bits a weight: ./best" in capsys.readouterr().out


def test_what_was_measured_is_told_where_none_keeps_to_the_limits(
    config: CompareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Comparison("m", "cpu", {}, tuple(MADE), {}, None, "")
    monkeypatch.setattr(quantizations, "compare", lambda *_: found)
    result = CliRunner().invoke(
        app, ["quantize", "compare", config.base.model, "--max-kl", "0.001", "--result-dir", str(tmp_path)]
    )
    assert result.exit_code == 1
    assert "gptq 4" in result.stdout
    assert "error: none of 3 quantizations keeps to the limits: the least KL is 0.01 (gptq" in result.stderr
    assert json.loads((tmp_path / "quantize_compare.json").read_text())["winner"] is None


def test_limits_that_none_keeps_to_leave_nothing(config: CompareConfig, tmp_path: Path) -> None:
    base = replace(config.base, output=str(tmp_path / "out"), max_kl=1e-9)
    with pytest.raises(LlmctlError, match="none of 1 quantizations keeps to the limits: the least KL is") as caught:
        choose_method(replace(config, base=base, methods=("rtn",), bits=(4,)), SHOWN)
    assert not isinstance(caught.value, UsageError)
    assert [path.name for path in tmp_path.iterdir()] == ["calib.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("magic",)}, "--methods: expected some of rtn"),
        ({"methods": ()}, "found nothing"),
        ({"bits": (5,)}, "--bits 5"),
        ({"base": {"max_kl": -1.0}}, "--max-kl -1"),
        ({"base": {"max_size": "lots"}}, "expected a size"),
        ({"base": {"output": "somewhere"}}, "which quantization to keep"),
        ({"base": {"calib": "missing.txt"}}, "no such file"),
        ({"base": {"output": "best", "format": "gguf", "max_kl": 1.0}}, "--output best: gguf is one file, NAME.gguf"),
        ({"base": {"output": "a.gguf", "max_kl": 1.0}}, "--output a.gguf: gptq is a folder"),
        ({"base": {"target_bpw": 4.0}}, "--bits: those of each linear are chosen"),
    ],
    ids=str,
)
def test_refusals_come_before_any_work(changes: dict[str, object], message: str, config: CompareConfig) -> None:
    more = changes.get("base", {})
    assert isinstance(more, dict)
    with pytest.raises(UsageError, match=message):
        compare(replace(config, **{**changes, "base": replace(config.base, **more)}), SHOWN)  # type: ignore[arg-type]


def arguments(config: CompareConfig) -> list[str]:
    base = config.base
    args = ["--group-size", "32", "--symmetric", "--calib", base.calib, "--calib-samples", "4", "--calib-length", "32"]
    return [*args, "--format", "gptq"]


def test_the_command_writes_a_table_json_and_a_picture(config: CompareConfig, tmp_path: Path) -> None:
    args = ["quantize", "compare", config.base.model, *arguments(config), "--methods", "rtn", "--bits", "3,4"]
    args += ["--text", config.text, "--context", "64", "--target", "reference", "--result-dir", str(tmp_path)]
    result = CliRunner().invoke(app, [*args, "--max-size", "1GiB", "-o", str(tmp_path / "out")])
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    for said in ("rtn 3", "rtn 4", "original 16", "tok/s", "kept rtn, 4 bits"):
        assert said in result.stdout
    data = json.loads((tmp_path / "quantize_compare.json").read_text())
    assert len(data["candidates"]) == 3
    assert data["candidates"][data["winner"]]["bits"] == 4
    assert "<svg" in (tmp_path / "quantize_compare.svg").read_text()
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "limit",
    [pytest.param(("--max-kl", "10", "--bits", "4"), marks=pytest.mark.slow), ("--target-bpw", "5")],
    ids=" ".join,
)
def test_auto_on_the_command_line(limit: tuple[str, ...], config: CompareConfig, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    args = ["quantize", "--model", config.base.model, *arguments(config), "--method", "auto", "--output", output]
    result = CliRunner().invoke(app, [*args, *limit, "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["output"] == output
    assert "kept" in result.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--method auto: chosen by what?"),
        (["--max-kl", "1", "--method", "rtn"], "--method auto, not rtn"),
        (["--max-kl", "1", "--resume"], "has no --resume"),
        (["--target-bpw", "4", "--bits", "4"], "--bits: those of each linear are chosen"),
        (["--max-kl", "1", "--output", ""], "--output: the folder to write is missing"),
    ],
)
def test_auto_wants_limits(more: list[str], message: str, config: CompareConfig, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    args = ["quantize", "--model", config.base.model, *arguments(config), "--method", "auto", "--output", output]
    result = CliRunner().invoke(app, [*args, *more])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
