import errno
import importlib.util
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
from random_models import write_model
from typer.testing import CliRunner

from llmctl.cli.main import app
from llmctl.config import QuantizeConfig, load_yaml_options
from llmctl.errors import LlmctlError, UsageError
from llmctl.quantize.backends import BACKENDS, run_backend
from llmctl.quantize.workfolder import write_text

TEXT = "the quick brown fox reads a book about engines and kernels, then it sits down to write numbers. " * 40
RECIPES = sorted((Path(__file__).parents[2] / "configs" / "quantize").glob("*.yaml"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama", hidden_size=64, intermediate_size=128)


@pytest.fixture
def common(model: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "calib.txt"
    text.write_text(TEXT)
    output = str(tmp_path / "out")
    sizes = ["--calib-samples", "4", "--calib-length", "32"]
    return ["quantize", "--model", str(model), "--output", output, "--calib", str(text), *sizes]


def test_json_is_all_that_stdout_holds(common: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*common, "--group-size", "32", "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["method"] == "awq"
    assert report["format"] == "awq"
    assert len(report["layers"]) == 2
    assert "layer 2/2" in result.stderr
    assert "calibration: 4 samples of 32 tokens" in result.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_tables_at_the_end(common: list[str]) -> None:
    result = CliRunner().invoke(app, [*common, "--method", "gptq", "--group-size", "32"])
    assert result.exit_code == 0, result.stderr
    for words in ("attention", "░", "_proj", " at 16 bits -> ", "bits per weight", "output error", "time", "next"):
        assert words in result.stdout
    for words in ("perplexity", "KL", "llmctl serve ", "quantize_report.json"):
        assert words in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk is like: writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_is_one_line_and_resumed(common: list[str], tmp_path: Path) -> None:
    args = [*common, "--group-size", "32", "--eval-text", "none"]
    whole = CliRunner().invoke(app, [*args, "--output", str(tmp_path / "whole")])
    assert whole.exit_code == 0, whole.stderr
    layer = 4 * 64 * 64  # codes of one layer alone are more
    for size in (layer, layer):
        with files_of_at_most(size):
            failed = CliRunner().invoke(app, [*args, *(["--resume"] if (tmp_path / "out.partial").exists() else [])])
        assert failed.exit_code == 1
        last = failed.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert "File too large (fix: make room, then repeat the command with --resume: finished layers are in" in last
        assert not (tmp_path / "out").exists()
        assert [path.name for path in tmp_path.rglob("*.tmp-*")] == []
    resumed = CliRunner().invoke(app, [*args, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_nothing_is_left_of_a_small_file_that_does_not_fit(tmp_path: Path) -> None:
    with files_of_at_most(10), pytest.raises(OSError, match="File too large"):
        write_text(tmp_path / "a.json", "x" * 100)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_does_not_fit_is_a_warning(common: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("llmctl.quantize.report_files.write_text", full)
    result = CliRunner().invoke(app, [*common, "--method", "rtn", "--group-size", "32", "--eval-text", "none"])
    assert result.exit_code == 0
    assert "warning: the report's files are not written: No space left on device" in result.stderr
    assert "every layer" not in result.stdout
    assert "llmctl serve" in result.stdout


def test_options_that_a_method_has_no_use_for_are_named(common: list[str]) -> None:
    args = [*common, "--group-size", "32", "--eval-text", "none", "--sweeps", "3"]
    result = CliRunner().invoke(app, [*args, "--method", "rtn"])
    assert "not used by --method rtn: --sweeps, --calib, --calib-samples, --calib-length\n" in result.stderr
    result = CliRunner().invoke(app, [*args, "--method", "gptq", "--output", common[4] + "-2"])
    assert result.exit_code == 0
    assert "not used" not in result.stderr


def test_a_bad_group_size_is_one_line_and_exit_code_two(common: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, [*common, "--group-size", "48"])
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: --group-size 48 does not divide the input width 64 of model.layers.0.")
    assert "32, 64" in line
    assert [p.name for p in tmp_path.iterdir()] == ["calib.txt"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_recipes_run(recipe: Path, common: list[str]) -> None:
    options = load_yaml_options(recipe, vars(QuantizeConfig()))
    fitting = ["--group-size", "32"] if options["group_size"] > 0 else []
    fitting += ["--target-bpw", "5"] if "target_bpw" in options else []
    result = CliRunner().invoke(app, [*common, "--config", str(recipe), *fitting, "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    width = f"{options['target_bpw']}bpw" if "target_bpw" in options else f"{report['bits']}bit"
    assert f"{report['method']}-{width}" in recipe.stem


def test_recipes_are_there() -> None:
    assert len(RECIPES) >= 3


def test_an_unknown_key_in_a_recipe_is_refused(common: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("group_sise: 32\n")
    result = CliRunner().invoke(app, [*common, "--config", str(recipe)])
    assert result.exit_code == 2
    assert "did you mean 'group-size'" in result.stderr


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "native"])
def test_an_absent_backend_is_one_line(backend: str, common: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("awq", "auto_gptq", "gptqmodel"):
        monkeypatch.setitem(sys.modules, name, None)
    result = CliRunner().invoke(app, [*common, "--backend", backend])
    assert result.exit_code == 2
    assert f"--backend {backend}: the package is not installed" in result.stderr
    assert "native" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_backend_that_cannot_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "auto_gptq").mkdir()
    (tmp_path / "auto_gptq" / "__init__.py").write_text("from llmctl.errors import no_init_weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "auto_gptq", raising=False)
    with pytest.raises(UsageError, match="ImportError: cannot import name 'no_init_weights'"):
        run_backend(QuantizeConfig(model="m", output="o", backend="auto-gptq"))
    with pytest.raises(UsageError, match="expected one of native"):
        run_backend(QuantizeConfig(model="m", output="o", backend="magic"))


def install_fake_awq(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package ``awq`` whose model class cannot load anything."""

    class Auto:
        @staticmethod
        def from_pretrained(*_: object, **__: object) -> object:
            raise RuntimeError("no kernel\nimage")

    module = ModuleType("awq")
    module.__spec__ = ModuleSpec("awq", None)
    module.AutoAWQForCausalLM = Auto  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "awq", module)


def test_autoawq_refuses_what_it_does_not_have(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_awq(monkeypatch)
    base = {"model": str(model), "output": str(tmp_path / "out"), "backend": "autoawq", "group_size": 32}
    for changes in ({"method": "gptq"}, {"bits": 3}, {"symmetric": True}, {"resume": True}, {"format": "gptq"}):
        with pytest.raises(UsageError, match="autoawq"):
            run_backend(QuantizeConfig(**{**base, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_autoawq_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake_awq(monkeypatch)
    text = tmp_path / "calib.txt"
    text.write_text(TEXT)
    config = QuantizeConfig(
        model=str(model),
        output=str(tmp_path / "out"),
        backend="autoawq",
        group_size=32,
        calib=str(text),
        calib_samples=2,
        calib_length=16,
    )
    with pytest.raises(LlmctlError, match="--backend autoawq failed"):
        run_backend(config)
    assert [p.name for p in tmp_path.iterdir()] == ["calib.txt"]


@pytest.mark.skipif(importlib.util.find_spec("awq") is None, reason="autoawq is not installed")
def test_autoawq_writes_what_the_reader_reads(tmp_path: Path) -> None:
    from llmctl.checkpoint.opening import open_checkpoint

    # AutoAWQ asserts that output widths are multiples of 64.
    model = write_model(tmp_path / "model", "llama", intermediate_size=128, num_key_value_heads=4)
    text = tmp_path / "calib.txt"
    text.write_text(TEXT)
    config = QuantizeConfig(
        model=str(model),
        output=str(tmp_path / "out"),
        backend="autoawq",
        group_size=32,
        calib=str(text),
        calib_samples=4,
        calib_length=64,
    )
    report = run_backend(config)
    made = open_checkpoint(tmp_path / "out")
    assert made.quantization is not None
    assert made.quantization.method == report.format == "awq"
    assert made.describe("model.layers.0.mlp.down_proj.weight").quant is not None


def test_overrides_from_a_recipe_and_from_the_command_line(common: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('override:\n  - {match: "*.down_proj", bits: 8}\n  - "layers.0.mlp:group-size=16"\n')
    rtn = [*common, "--method", "rtn", "--group-size", "32", "--config", str(recipe)]
    result = CliRunner().invoke(app, [*rtn, "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["schemes"] == {
        "4 bits, symmetric, groups of 32": 10,
        "4 bits, symmetric, groups of 16": 2,
        "8 bits, symmetric, groups of 16": 1,
        "8 bits, symmetric, groups of 32": 1,
    }
    result = CliRunner().invoke(app, [*rtn[:4], str(tmp_path / "two"), *rtn[5:], "--override", "mlp:bits=3"])
    assert result.exit_code == 0, result.stderr
    assert "6 linears of 3 bits, symmetric, groups of 32" in " ".join(result.stdout.replace("│", " ").split())
    assert "3 bits: read by llmctl" in result.stderr


@pytest.mark.parametrize("said", ["{bits: 8}", "{match: mlp}", "{match: mlp, bitz: 8}", "[1]"])
def test_an_override_that_says_nothing_is_one_line(said: str, common: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"override: [{said}]\n")
    result = CliRunner().invoke(app, [*common, "--config", str(recipe)])
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    assert "override" in line
