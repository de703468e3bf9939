"""Merging: sums, quantized bases, heads that are untied, and ``llmctl merge`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import RANK, products, settings, write
from family_models import family_model
from peft_adapters import save_adapter
from tiny_checkpoint import HIDDEN, VOCAB, dense_tensors, write_arrays, write_dense, write_gptq
from typer.testing import CliRunner

from llmctl.checkpoint.adapters.merging import Weighted, merged_checkpoint
from llmctl.checkpoint.adapters.opening import Named, open_merged
from llmctl.checkpoint.adapters.reading import read_adapter
from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import OutputFormat
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.writer import write_quantized_checkpoint
from llmctl.cli.main import app
from llmctl.config import QuantizeConfig
from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.plan import make_plan
from llmctl.quantize.rtn import quantize_rtn

Q = "model.layers.0.self_attn.q_proj"


def dense(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    found = checkpoint.weight(name)
    return found.dequantize() if isinstance(found, QuantizedWeight) else found.float()


def delta(tensors: dict[str, np.ndarray], module: str, scale: float = 2.0) -> torch.Tensor:
    a, b = (torch.from_numpy(tensors[f"base_model.model.{module}.lora_{piece}.weight"]) for piece in "AB")
    return scale * b @ a


def test_a_weighted_sum(tmp_path: Path) -> None:
    base = write_dense(tmp_path / "base")
    one, two = products("q_proj"), products("q_proj", "up_proj", rank=2)
    write(tmp_path / "one", settings(), one)
    write(tmp_path / "two", settings(r=2, target_modules=["q_proj", "up_proj"]), two)
    merged = open_merged(str(base), [f"{tmp_path / 'one'}=0.5", f"{tmp_path / 'two'}=-2"], "x")
    before, after = merged.base, merged.checkpoint
    expected = dense(before, f"{Q}.weight") + 0.5 * delta(one, Q) - 2 * delta(two, Q, 4.0)
    torch.testing.assert_close(dense(after, f"{Q}.weight"), expected)
    for name in set(before.names()) - {n for n in before.names() if n.endswith(("q_proj.weight", "up_proj.weight"))}:
        assert torch.equal(after.weight(name), before.weight(name))
    assert after.names() == before.names()
    assert after.fingerprint() != before.fingerprint()


@pytest.mark.parametrize("act_order", [False, True])
def test_a_quantized_base_is_dequantized(act_order: bool, tmp_path: Path) -> None:
    base = write_gptq(tmp_path / "base", act_order=act_order)
    tensors = products("q_proj")
    merged = open_merged(str(base), [str(write(tmp_path / "a", settings(), tensors))], "x")
    assert merged.checkpoint.quantization is None
    assert "quantization_config" not in merged.checkpoint.config
    assert merged.notes[-1].endswith("is quantized (gptq): dequantized, then merged")
    expected = dense(merged.base, f"{Q}.weight") + delta(tensors, Q)
    torch.testing.assert_close(merged.checkpoint.weight(f"{Q}.weight"), expected)
    up = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(merged.checkpoint.weight(up), dense(merged.base, up))
    assert {merged.checkpoint.describe(name).quant for name in merged.checkpoint.names()} == {None}


def test_a_head_that_shares_the_embeddings_keeps_what_it_had(tmp_path: Path) -> None:
    arrays = {name: array for name, array in dense_tensors().items() if name != "lm_head.weight"}
    base = write_arrays(tmp_path / "base", arrays, tie_word_embeddings=True)
    embedding = np.random.default_rng(1).normal(size=(VOCAB, HIDDEN)).astype(np.float16)
    tensors = products("q_proj") | {"base_model.model.model.embed_tokens.weight": embedding}
    write(tmp_path / "a", settings(modules_to_save=["embed_tokens"]), tensors)
    code, out, err = merge(str(base), str(tmp_path / "a"), "--output", str(tmp_path / "out"))
    assert (code, err.count("error")) == (0, 0)
    assert "a tensor of its own now" in " ".join(out.replace("│", " ").split())
    made = open_checkpoint(tmp_path / "out")
    assert made.config["tie_word_embeddings"] is False
    assert np.array_equal(made.weight("model.embed_tokens.weight").numpy(), embedding)
    assert np.array_equal(made.weight("lm_head.weight").numpy(), arrays["model.embed_tokens.weight"])


def setter(folder: Path) -> Path:
    head = {"base_model.model.lm_head.weight": np.ones((VOCAB, HIDDEN), np.float16)}
    return write(folder, settings(modules_to_save=["lm_head"]), products("q_proj") | head)


def test_sums_that_mean_nothing(tmp_path: Path) -> None:
    base = str(write_dense(tmp_path / "base"))
    saved = str(setter(tmp_path / "saved"))
    with pytest.raises(UsageError, match=r"weight 0\.5: modules_to_save or biases can only be merged whole"):
        open_merged(base, [f"{saved}=0.5"], "x")
    with pytest.raises(UsageError, match=r"both change 'lm_head\.weight', and one of them replaces it"):
        open_merged(base, [saved, str(setter(tmp_path / "other"))], "x")
    plain = str(write(tmp_path / "plain", settings(), products("q_proj")))
    for weight in ("1e300", "-3e38"):
        with pytest.raises(UsageError, match=r"plain: weight .* makes values beyond float32"):
            open_merged(base, [f"{plain}={weight}"], "x")
    norms = {f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_magnitude_vector": np.ones(HIDDEN, np.float32)
             for i in (0, 1)}  # fmt: skip
    dora = str(write(tmp_path / "dora", settings(use_dora=True), products("q_proj") | norms))
    with pytest.raises(UsageError, match="DoRA can only be merged whole"):
        open_merged(base, [f"{dora}=2"], "x")
    for pair in ([dora, saved], [saved, dora]):
        with pytest.raises(UsageError, match=r"both change 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
            open_merged(base, pair, "x")


@pytest.mark.parametrize(
    ("text", "folder", "weight"),
    [
        ("a", "a", 1),
        ("a=0.5", "a", 0.5),
        ("a=b=-2", "a=b", -2),
        ("x=y", "x=y", 1),
        ("~/a", "/home/me/a", 1),
        ("~/a=2", "/home/me/a", 2),
    ],
)
def test_names_with_weights(
    text: str, folder: str, weight: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "x=y").mkdir()
    assert Named.parse(text, "x") == Named(Path(folder), weight)


@pytest.mark.parametrize("text", ["a=", "a=much", "a=nan", "a=inf", "=1"])
def test_weights_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected DIR or DIR=WEIGHT"):
        Named.parse(text, "x")


def merge(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["merge", *args])
    return result.exit_code, result.stdout, result.stderr


def test_merge_writes_what_anyone_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    base, tensors = write_dense(tmp_path / "base"), products("q_proj")
    write(tmp_path / "a", settings(), tensors)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("dtype: float32\n")
    code, out, _ = merge(
        str(base), f"{tmp_path / 'a'}=3", "-o", str(tmp_path / "out"), "--config", str(recipe), "--json"
    )
    report = json.loads(out)
    assert (code, report["dtype"], report["untied"]) == (0, "float32", False)
    assert report["adapters"] == [f"{tmp_path / 'a'}: weight 3, LoRA of 2 modules, rank {RANK}"]
    assert report["notes"] == [f"adapter {tmp_path / 'a'}: trained on 'org/tiny', used with 'base'; shapes agree"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = torch.from_numpy(dense_tensors()[f"{Q}.weight"]).float()
    torch.testing.assert_close(stored[f"{Q}.weight"], original + 3 * delta(tensors, Q))
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert report["size"] == sum(t.nbytes for t in stored.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["dtype"], "quantization_config" in config) == ("float32", False)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["{base}", "{a}"], 2, "--output is missing"),
        (["{base}", "-o", "{out}"], 2, "ADAPTER"),
        (["{base}", "{a}", "-o", "{base}"], 2, "exists already"),
        (["{base}", "{a}", "-o", "{link}"], 2, "exists already"),
        (["{base}", "{a}", "-o", "{out}.gguf"], 2, "a folder, found the name of a .gguf file"),
        (["{base}", "{a}", "-o", "{out}", "--dtype", "int8"], 2, "--dtype int8: expected auto"),
        (["{base}", "{base}", "-o", "{out}"], 2, "not a PEFT adapter"),
        (["{a}", "{a}", "-o", "{out}"], 2, "an adapter, not a model (fix: merge it: llmctl merge BASE"),
        (["{base}", "{large}", "-o", "{out}"], 1, "has values that are too large for float16"),
        (["{base}", "{a}=1e38", "-o", "{out}"], 1, "'model.layers.0.self_attn.q_proj.weight': merged values are not"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(args: list[str], code: int, said: str, tmp_path: Path) -> None:
    write_dense(tmp_path / "base")
    write(tmp_path / "a", settings(), products("q_proj"))
    write(tmp_path / "large", settings(lora_alpha=1e6), products("q_proj"))
    (tmp_path / "link").symlink_to("nothing")
    names = {name: str(tmp_path / name) for name in ("base", "a", "large", "link", "out")}
    found, out, err = merge(*(arg.format(**names) for arg in args))
    assert (found, out) == (code, "")
    assert said in err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base", "large", "link"]


def quantize(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["quantize", *args])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("quantized_base", [pytest.param(False, marks=pytest.mark.slow), True])
def test_merged_then_quantized(quantized_base: bool, tmp_path: Path) -> None:
    """As merging first and quantizing that, byte for byte; the KL is from base and adapter in float32."""
    base = str((write_gptq if quantized_base else write_dense)(tmp_path / "base"))
    adapter = str(write(tmp_path / "a", settings(), products("q_proj")))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 40)
    common = ["--method", "rtn", "--group-size", "32", "--eval-text", str(text)]
    code, out, err = quantize("--model", base, "--merge-adapter", adapter, "-o", str(tmp_path / "one"), *common)
    assert code == 0, err
    assert ("dequantized, then merged" in err) is quantized_base
    assert f"LoRA of 2 modules, rank {RANK}" in " ".join(out.replace("│", " ").split())
    assert merge(base, adapter, "-o", str(tmp_path / "merged"), "--dtype", "float32")[0] == 0
    assert quantize("--model", str(tmp_path / "merged"), "-o", str(tmp_path / "two"), *common)[0] == 0
    found = [json.loads((tmp_path / name / "quantize_report.json").read_text()) for name in ("one", "two")]
    assert found[0]["merged"] == [f"{adapter}: weight 1, LoRA of 2 modules, rank {RANK}"]
    assert found[0]["quality"]["kl"] == pytest.approx(found[1]["quality"]["kl"], abs=1e-6)
    assert found[0]["quality"]["kl"] > 0
    one, two = (open_checkpoint(tmp_path / name) for name in ("one", "two"))
    for name in one.names():
        assert torch.equal(dense(one, name), dense(two, name)), name


def test_another_weight_is_another_run(tmp_path: Path) -> None:
    """Of ``--resume``: the work folder of one sum is not taken for that of another."""
    base = str(write_dense(tmp_path / "base"))
    adapter = str(write(tmp_path / "a", settings(), products("q_proj")))

    def options(*adapters: str) -> dict[str, Any]:
        config = QuantizeConfig(base, str(tmp_path / "out"), "rtn", group_size=32, merge_adapter=adapters)
        checkpoint = open_merged(base, adapters, "x").checkpoint
        return make_plan(config, checkpoint, checkpoint_graph(checkpoint)).options(checkpoint)

    found = [options(), options(adapter), options(f"{adapter}=2")]
    assert all(one != other for i, one in enumerate(found) for other in found[:i])


@pytest.mark.slow
def test_a_quantized_base_whose_dense_weights_are_turned(tmp_path: Path) -> None:
    """GPT-2's linears are stored [in, out] when they are dense, [out, in] when they are not."""
    save_adapter(tmp_path / "a", "gpt2", target_modules=["c_attn", "c_proj"])
    model = family_model("gpt2")
    adapter = read_adapter(tmp_path / "a", model.graph)
    scheme = QuantScheme(8, -1, symmetric=True)
    parts = [part for weight in model.graph.weights.values() for part in weight.parts if part.transpose]
    names = sorted({part.tensor.removesuffix(".weight") for part in parts})
    quantized = {n: quantize_rtn(dense(model.checkpoint, f"{n}.weight").T.contiguous(), scheme) for n in names}
    written = OutputFormat("compressed-tensors", scheme, ignored=("lm_head",))
    write_quantized_checkpoint(tmp_path / "q", model.checkpoint, quantized, {}, written)
    base = open_checkpoint(tmp_path / "q")
    merged, _ = merged_checkpoint(base, checkpoint_graph(base), [Weighted(adapter)])
    for part in adapter.parts:
        expected = (dense(base, f"{part.module}.weight") + part.scale * part.b @ part.a).T
        torch.testing.assert_close(merged.weight(f"{part.module}.weight"), expected)
    untouched = next(n for n in names if n.endswith("c_fc"))
    assert torch.equal(merged.weight(f"{untouched}.weight"), dense(base, f"{untouched}.weight").T)
    assert checkpoint_graph(merged).weights == model.graph.weights


def test_options_that_do_not_go_with_adapters(tmp_path: Path) -> None:
    base, out = str(write_dense(tmp_path / "base")), str(tmp_path / "out")
    adapter = str(write(tmp_path / "a", settings(), products("q_proj")))
    code, _, err = quantize("--model", base, "--merge-adapter", adapter, "-o", out, "--method", "auto")
    assert (code, err.count("\n")) == (2, 1)
    assert f"llmctl merge {base} {adapter} --output DIR" in err
