import json
import math
import random
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from random_models import CONFIGS, FAMILIES, MORE_FAMILIES, logits_of, write_model
from safetensors.torch import load_file, save_file

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.config import QuantizeConfig
from llmctl.errors import CheckpointError, LlmctlError, UsageError
from llmctl.quantize import driver
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.quantize.report import QuantizeReport
from llmctl.quantize.rtn import quantize_searched
from llmctl.quantize.workfolder import WorkFolder
from llmctl.targets.reference.weights import CheckpointWeights
from llmctl.text.tokenizer import Tokenizer

WORDS = (
    "the quick brown fox reads a book about engines and kernels then it sits down to write numbers in caches".split()
)
TEXT = " ".join(random.Random(0).choices(WORDS, k=1500))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def config(model: Path, text: Path, tmp_path: Path) -> QuantizeConfig:
    return QuantizeConfig(
        model=str(model),
        output=str(tmp_path / "out"),
        group_size=16,
        calib=str(text),
        calib_samples=16,
        calib_length=48,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def logits(folder: Path, tokens: list[list[int]]) -> torch.Tensor:
    checkpoint = open_checkpoint(folder)
    graph = checkpoint_graph(checkpoint)
    return logits_of(graph, CheckpointWeights(graph, checkpoint), tokens)


def distance(folder: Path, other: Path) -> float:
    """Mean KL divergence over 2,000 tokens: a few in which attention turns from one near tie to the other have most of
    it, and outweigh in 300 tokens what a method gains in all others."""
    encoded = Tokenizer.from_folder(folder).encode(TEXT)
    tokens = [encoded[start : start + 100] for start in range(0, 2000, 100)]
    p, q = (logits(f, tokens).log_softmax(dim=-1) for f in (folder, other))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


def test_rtn_holds_the_rounded_weights(config: QuantizeConfig, model: Path) -> None:
    report = quantize_checkpoint(replace(config, method="rtn"))
    source, made = open_checkpoint(model), open_checkpoint(Path(config.output))
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        found, expected = made.weight(name), quantize_searched(source.weight(name), report_scheme(report))
        assert isinstance(found, QuantizedWeight)
        assert torch.equal(found.dequantize(), expected.dequantize())
    assert isinstance(made.weight("lm_head.weight"), torch.Tensor)
    assert report.error_of == "weight"
    assert not Path(config.output + ".partial").exists()


def report_scheme(report: QuantizeReport) -> object:
    from llmctl.graph.graph import QuantScheme

    return QuantScheme(report.bits, report.group_size, report.symmetric)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        *(pytest.param("awq", f, marks=() if f in ("gpt2", "phi3", "qwen3") else pytest.mark.slow) for f in FAMILIES),
        # GPTQ knows a family by its fused tensors only.
        *(pytest.param("gptq", f, marks=() if f == "gpt2" else pytest.mark.slow) for f in FAMILIES),
    ],
)
def test_every_family_survives(family: str, method: str, config: QuantizeConfig, tmp_path: Path) -> None:
    source = write_model(tmp_path / family, family)
    quantize_checkpoint(replace(config, model=str(source), method=method, bits=8))
    made = open_checkpoint(Path(config.output))
    assert made.quantization is not None
    assert distance(source, Path(config.output)) < 2e-3
    assert made.aux_files().keys() == open_checkpoint(source).aux_files().keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_methods_beat_rounding_on_more_families(family: str, config: QuantizeConfig, tmp_path: Path) -> None:
    """Whatever their norms, and where scales cannot be folded: closer to the original than rounding alone."""
    experts = CONFIGS[family].get("num_experts")
    # All of them are chosen: near ties that turn would outweigh what rounding to 8 bits does.
    source = write_model(tmp_path / family, family, **({"num_experts_per_tok": experts} if experts else {}))
    ignore = ("lm_head", "query_key_value") if family == "gpt_neox" else ("lm_head",)
    found = {}
    for method in ("rtn", "awq", "gptq"):
        made = replace(config, model=str(source), output=str(tmp_path / method), method=method, bits=8, ignore=ignore)
        quantize_checkpoint(made)
        found[method] = distance(source, tmp_path / method)
    assert max(found["awq"], found["gptq"]) < 0.95 * found["rtn"] < 0.1


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "awq", "bits": 4},
        pytest.param({"method": "awq", "bits": 4, "format": "gptq", "symmetric": True}, marks=pytest.mark.slow),
        pytest.param({"method": "awq", "bits": 3, "group_size": 32}, marks=pytest.mark.slow),
        {"method": "gptq", "bits": 4, "static_groups": False},
        {"method": "gptq", "bits": 4, "act_order": False, "format": "awq", "symmetric": False},
        pytest.param({"method": "gptq", "bits": 3, "group_size": -1}, marks=pytest.mark.slow),
        pytest.param(
            {"method": "gptq", "bits": 4, "group_size": -1, "static_groups": False, "symmetric": False},
            marks=pytest.mark.slow,
        ),
        {"method": "gptq", "bits": 4, "format": "compressed-tensors"},
        {"method": "awq+gptq", "bits": 4, "original_targets": 0.5},
        pytest.param({"method": "awq+gptq", "bits": 3}, marks=pytest.mark.slow),
        pytest.param({"method": "awq", "bits": 4, "format": "compressed-tensors"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_output_is_what_was_measured(changes: dict[str, object], config: QuantizeConfig, model: Path) -> None:
    config = replace(config, **changes)  # type: ignore[arg-type]
    report = quantize_checkpoint(config)
    made = open_checkpoint(Path(config.output))
    assert made.quantization is not None
    assert made.quantization.method == report.format.removesuffix("_v2")
    usual = "awq" if (config.method, config.bits) == ("awq", 4) else "gptq"
    wanted = usual if config.format == "auto" else config.format
    assert report.format == ("gptq_v2" if wanted == "gptq" and not config.is_symmetric else wanted)
    weight = made.weight("model.layers.1.mlp.down_proj.weight")
    assert isinstance(weight, QuantizedWeight)
    assert weight.scheme.bits == config.bits
    out_of_order = "gptq" in config.steps and not config.static_groups and config.group_size != -1
    assert (weight.g_idx is not None) == out_of_order
    assert len(report.layers) == 2
    assert all(0 < error < 0.2 for layer in report.layers for error in layer.modules.values())
    rounded = replace(config, method="rtn", format="gptq", symmetric=config.is_symmetric)
    plain = quantize_checkpoint(replace(rounded, output=config.output + "-rtn"))
    assert distance(model, Path(config.output)) < 0.95 * distance(model, Path(plain.output))


def test_awq_scales_and_fold_into_the_norms(config: QuantizeConfig, model: Path) -> None:
    report = quantize_checkpoint(replace(config, method="awq", bits=3, group_size=32))
    assert any(alpha is not None for layer in report.layers for alpha in layer.scales.values())
    name = "model.layers.0.input_layernorm.weight"
    before, after = (open_checkpoint(f).weight(name) for f in (model, Path(config.output)))
    assert isinstance(after, torch.Tensor)
    assert after.dtype == torch.float16
    assert not torch.allclose(after.float(), before, rtol=0.05)


def test_ignored_linears_stay_dense_and_equal(config: QuantizeConfig, model: Path) -> None:
    made_by = replace(config, method="awq", ignore=("lm_head", "o_proj", "layers.1.mlp"))
    report = quantize_checkpoint(made_by)
    made = open_checkpoint(Path(config.output))
    assert "model.layers.1.mlp.up_proj" in report.dense_modules
    kept = made.weight("model.layers.1.mlp.up_proj.weight")
    assert isinstance(kept, torch.Tensor)
    assert distance(model, Path(config.output)) < 0.05


def test_an_untied_head_on_request(config: QuantizeConfig, model: Path) -> None:
    report = quantize_checkpoint(replace(config, method="gptq", bits=8, ignore=()))
    made = open_checkpoint(Path(config.output))
    assert isinstance(made.weight("lm_head.weight"), QuantizedWeight)
    assert report.dense_modules == ()
    assert distance(model, Path(config.output)) < 5e-3


def test_self_calibration_is_seeded(config: QuantizeConfig, tmp_path: Path) -> None:
    config = replace(config, calib="self", calib_samples=4, calib_length=24, method="gptq")
    folders = []
    for i, seed in enumerate((0, 0, 1)):
        folders.append(tmp_path / f"run{i}")
        report = quantize_checkpoint(replace(config, output=str(folders[-1]), seed=seed))
        assert "written by the model itself" in report.calibration
    first, second, third = map(contents, folders)
    assert first == second
    assert first != third


class Killed(BaseException):
    pass


MOMENTS = ("before layer 0", "before layer 1", "inside layer 1's save", "before the end")
# Every method, every moment; all products are slow.
_INTERRUPTED = {("awq", MOMENTS[0]), ("awq+gptq", MOMENTS[1]), ("gptq", MOMENTS[2]), ("rtn", MOMENTS[3])}


@pytest.mark.parametrize(
    ("method", "moment"),
    [
        pytest.param(*case, marks=() if case in _INTERRUPTED else pytest.mark.slow)
        for case in product(("rtn", "awq", "gptq", "awq+gptq"), MOMENTS)
    ],
)
def test_resume_gives_the_same_bytes(
    method: str, moment: str, config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, method=method, bits=4, original_targets=0.5)
    whole = replace(config, output=config.output + "-whole")
    quantize_checkpoint(whole)
    if moment == "inside layer 1's save":
        die_in(monkeypatch, WorkFolder, "save_hidden", lambda _, index, __: index == 2)
    elif moment == "before the end":
        die_in(monkeypatch, driver, "write_quantized_checkpoint", lambda *_: True)
    else:
        die_in(monkeypatch, driver._Job, "_step", lambda _, __, layer, *___: layer == int(moment[-1]))
    with pytest.raises(Killed):
        quantize_checkpoint(config)
    monkeypatch.undo()
    assert not Path(config.output).exists()
    if method != "rtn":
        die_in(monkeypatch, driver, "calibrate", lambda *_: True)  # the tokens are kept
    with pytest.raises(UsageError, match="--resume"):
        quantize_checkpoint(config)
    quantize_checkpoint(replace(config, resume=True))
    assert contents(Path(config.output)) == contents(Path(whole.output))
    assert not Path(config.output + ".partial").exists()


def die_in(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, when: object) -> None:
    real = getattr(owner, name)

    def wrapper(*args: object, **kwargs: object) -> object:
        if when(*args):  # type: ignore[operator]
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)


def test_resume_refuses_other_options_by_name(config: QuantizeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    die_in(monkeypatch, driver._Job, "_step", lambda _, __, layer, *___: layer == 1)
    with pytest.raises(Killed):
        quantize_checkpoint(config)
    monkeypatch.undo()
    kept = contents(Path(config.output + ".partial"))
    with pytest.raises(UsageError, match="seed was 0, is 7") as caught:
        quantize_checkpoint(replace(config, resume=True, seed=7, group_size=32))
    assert "group-size was 16, is 32" in str(caught.value)
    assert contents(Path(config.output + ".partial")) == kept
    options = Path(config.output + ".partial") / "options.json"
    options.write_text(json.dumps({**json.loads(options.read_text()), "llmctl": "0.0.9", "torch": "1.0"}))
    with pytest.raises(UsageError, match=r"llmctl was 0\.0\.9, is [0-9.]+\+[0-9a-f]{12}; torch was 1\.0, is [0-9]"):
        quantize_checkpoint(replace(config, resume=True))


def test_resume_without_anything_to_resume_starts(config: QuantizeConfig) -> None:
    quantize_checkpoint(replace(config, resume=True))
    assert Path(config.output).is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 48}, "16, 32|8, 16|-1"),
        ({"bits": 5}, "--bits 5"),
        ({"method": "magic"}, "--method magic"),
        ({"format": "ggml"}, "--format ggml"),
        ({"bits": 3, "format": "awq"}, "found 3 bits"),
        ({"method": "gptq", "static_groups": False, "format": "awq"}, "act-order"),
        ({"method": "gptq", "static_groups": False, "format": "compressed-tensors"}, "act-order"),
        ({"bits": 3, "format": "compressed-tensors"}, "read at 4 and 8 bits"),
        ({"bits": 8, "format": "compressed-tensors-w8a8"}, "one scale a row"),
        ({"method": "gptq", "format": "gguf", "group_size": 16}, "groups of 16"),
        ({"format": "gguf", "group_size": 32}, "fitted zero points"),
        ({"method": "gptq", "format": "gguf", "group_size": 32}, "one file, NAME.gguf"),
        ({"calib": "missing.txt"}, "no such file"),
        ({"calib": "no-such-dataset"}, "datasets"),
        ({"calib_length": 1000}, "3 to 128"),
        ({"calib_samples": 0}, "at least 1"),
        ({"ignore": ("lm_haed",)}, "lm_haed"),
        ({"damp_percent": 0.0}, "--damp-percent"),
        ({"sweeps": -1}, "--sweeps"),
        ({"original_targets": 1.5}, "--original-targets"),
        ({"threads": 0}, "--threads"),
        ({"model": "/nowhere"}, "nowhere"),
        ({"output": ""}, "--output"),
    ],
    ids=str,
)
def test_refusals_leave_nothing_behind(
    changes: dict[str, object], message: str, config: QuantizeConfig, tmp_path: Path
) -> None:
    with pytest.raises(LlmctlError, match=message) as caught:
        quantize_checkpoint(replace(config, **changes))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def with_value(model: Path, folder: Path, name: str, value: float) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("method", "value", "name"),
    [
        ("rtn", math.inf, "model.embed_tokens.weight"),
        ("rtn", math.nan, "model.layers.1.mlp.up_proj.weight"),
        ("awq", math.nan, "model.embed_tokens.weight"),
        ("gptq", math.inf, "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    method: str, value: float, name: str, config: QuantizeConfig, model: Path, tmp_path: Path
) -> None:
    folder = with_value(model, tmp_path / "bad", name, value)
    with pytest.raises(CheckpointError, match=f"'{name}'.* not finite") as caught:
        quantize_checkpoint(replace(config, model=str(folder), method=method))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    ("method", "ignore", "said"),
    [
        ("awq", "lm_head", "the inputs of layers.1.down_proj are"),
        ("gptq", "lm_head", "the error of layers.1.up_proj, layers.1.down_proj is"),
        ("gptq", "up_proj", "the inputs of layers.1.down_proj are"),
    ],
)
def test_a_layer_that_overflows_does_not_count_as_done(
    method: str, ignore: str, said: str, config: QuantizeConfig, model: Path, tmp_path: Path
) -> None:
    folder = with_value(model, tmp_path / "bad", "model.layers.1.mlp.up_proj.weight", 1e37)
    with pytest.raises(LlmctlError, match=f"layer 1: {said} not finite"):
        quantize_checkpoint(replace(config, model=str(folder), method=method, ignore=(ignore,)))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_an_error_that_is_no_number_stops(
    error: float, config: QuantizeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmctl.quantize.layers.relative_error", lambda *_: error)
    with pytest.raises(LlmctlError, match=r"layer 0: the error of layers\.0\.q_proj, .* is not finite"):
        quantize_checkpoint(replace(config, method="rtn"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_superfluous_is_left_out_and_an_own_head_stays(
    config: QuantizeConfig, model: Path, tmp_path: Path
) -> None:
    """A stored head beside tied embeddings is the output's, whose config says so; buffers do not go along."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"model.rotary_emb.inv_freq": torch.ones(8), "model.layers.0.mlp.up_proj.bias": torch.zeros(96)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    quantize_checkpoint(replace(config, model=str(folder), method="rtn"))
    made = open_checkpoint(Path(config.output))
    assert made.config["tie_word_embeddings"] is False
    assert set(made.names()) == set(open_checkpoint(model).names())
    assert torch.equal(made.weight("lm_head.weight"), tensors["lm_head.weight"].half())


def test_an_output_that_exists_is_kept(config: QuantizeConfig) -> None:
    Path(config.output).mkdir()
    (Path(config.output) / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists already"):
        quantize_checkpoint(config)
    assert contents(Path(config.output)) == {"mine": b"x"}


def test_a_quantized_checkpoint_is_refused(config: QuantizeConfig) -> None:
    quantize_checkpoint(replace(config, method="rtn"))
    with pytest.raises(UsageError, match="quantized already"):
        quantize_checkpoint(replace(config, model=config.output, output=config.output + "-2"))


def test_report_adds_up(config: QuantizeConfig) -> None:
    report = quantize_checkpoint(replace(config, method="awq"))
    data = json.loads(json.dumps(report.to_json()))
    assert data["size_after"] == (Path(config.output) / "model.safetensors").stat().st_size
    assert data["bits_per_weight"] == pytest.approx(4 + 20 / 16)
    assert data["size_before"] == pytest.approx(2 * data["size_16bit"], rel=0.01)
    assert [layer["layer"] for layer in data["layers"]] == [0, 1]
    assert data["quantized_modules"] == 14


@pytest.mark.parametrize(("method", "symmetric"), [("rtn", True), ("gptq", True), ("awq", False)])
def test_zero_points_are_fixed_unless_the_usual_layout_stores_them(
    method: str, symmetric: bool, config: QuantizeConfig
) -> None:
    report = quantize_checkpoint(replace(config, method=method, bits=8))
    assert report.symmetric is symmetric
    settings = json.loads((Path(config.output) / "quantize_config.json").read_text())
    assert settings["sym"] is symmetric
    assert settings["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


class Notes(driver.Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.mark.parametrize("bits", [3, 4])
def test_who_reads_three_bits_is_said_first(bits: int, config: QuantizeConfig) -> None:
    said = Notes()
    quantize_checkpoint(replace(config, method="rtn", bits=bits, group_size=32), said)
    assert said.lines[0].startswith("3 bits: read by llmctl, GPTQModel") == (bits == 3)
