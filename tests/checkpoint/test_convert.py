"""Every format into every other that holds the same numbers, and the refusals of those that do not."""

import json
from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import random_weight
from quantized_files import FORMATS as FOREIGN
from quantized_files import write_gguf_pair, write_pair
from random_models import write_model

from llmctl.checkpoint.convert import CONVERTED, ConvertReport, convert_checkpoint
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.output_format import FORMATS, OutputFormat
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.writer import write_quantized_checkpoint
from llmctl.config import ConvertConfig
from llmctl.errors import UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.text.tokenizer import Tokenizer

ZEROS = ("awq", "gptq_v2", "compressed-tensors")
FIXED = ("awq", "gptq", "compressed-tensors", "gguf")
WORDS = ("gptq_v2", "compressed-tensors", "gguf")
W8A8 = "compressed-tensors-w8a8"


@dataclass(frozen=True)
class Case:
    """A source: a scheme written in a format, or one of ``quantized_files``; and the targets that hold its numbers."""

    held: tuple[str, ...]
    format: str = ""
    scheme: QuantScheme | None = None
    powers: bool = False


FOUR, EIGHT, ROW = QuantScheme(4, 32, True), QuantScheme(8, 32, True), QuantScheme(8, -1, True)
FITTED = QuantScheme(4, 32, False)
CASES = {
    "awq": Case(ZEROS, "awq", FITTED),
    "awq-symmetric": Case(FIXED, "awq", FOUR),
    "awq-minimums-in-half": Case((*ZEROS, "gguf"), "awq", FITTED, powers=True),
    "gptq": Case(FIXED, "gptq", FOUR),
    "gptq-row": Case((*FIXED, "gptq_v2"), "gptq", QuantScheme(4, -1, True)),
    "gptq-3": Case(("gptq", "gguf"), "gptq", QuantScheme(3, 32, True)),
    "gptq-8": Case(("gptq", *WORDS), "gptq", EIGHT),
    "gptq-act-order": Case(("gptq", "gptq_v2"), "gptq", replace(FOUR, act_order=True)),
    "gptq_v2": Case(ZEROS, "gptq_v2", FITTED),
    "gptq_v2-8": Case(("gptq_v2", "compressed-tensors"), "gptq_v2", QuantScheme(8, 32, False)),
    "compressed-tensors": Case(FIXED, "compressed-tensors", FOUR),
    "compressed-tensors-8": Case(("gptq", W8A8, *WORDS), "compressed-tensors", ROW),
    "w8a8": Case(("gptq", W8A8, *WORDS), W8A8, ROW),
    "gguf-Q4_0": Case(FIXED, "gguf", FOUR),
    "gguf-Q4_1": Case(("gguf",), "gguf", FITTED, powers=True),
    "gguf-Q8_0": Case(("gptq", *WORDS), "gguf", EIGHT),
    "ct-w4-g128": Case(("awq", "gptq", "gptq_v2", "compressed-tensors")),
    "ct-w4-g32-asym": Case(ZEROS),
    "ct-w4-channel": Case(("awq", "gptq", "gptq_v2", "compressed-tensors")),
    "ct-w8a16": Case(("gptq", "gptq_v2", "compressed-tensors")),
    "ct-w8a8": Case(("gptq", "gptq_v2", "compressed-tensors", W8A8)),
    "ct-w8a8-static": Case(("gptq", "gptq_v2", "compressed-tensors", W8A8)),
    "ct-fp8-channel": Case(("compressed-tensors",)),
    "ct-fp8-tensor": Case(("compressed-tensors",)),
    "fp8-blocks": Case(("compressed-tensors",)),
    "modelopt-fp8": Case(("compressed-tensors",)),
    "bnb-nf4": Case(("bitsandbytes",)),
    "bnb-nf4-double": Case(("bitsandbytes",)),
    "bnb-fp4": Case(("bitsandbytes",)),
    "ggml-Q4_0": Case(("awq", "gptq", "compressed-tensors")),
    "ggml-Q6_K": Case(("compressed-tensors",)),
    "ggml-Q4_K": Case(()),
}
BY_DEFAULT = (
    *("awq", "awq-minimums-in-half", "gptq-8", "gptq-act-order", "gptq_v2", "compressed-tensors-8", "gguf-Q4_0"),
    *("ct-w8a8-static", "fp8-blocks", "bnb-nf4-double", "ggml-Q4_0"),
)
REFUSED_BY_DEFAULT = ("compressed-tensors", "gguf-Q4_1", "w8a8")
Truth = dict[str, torch.Tensor]
Make = Callable[[str], tuple[Path, Truth]]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Name -> a source, and what every linear's weight is."""
    made: dict[str, tuple[Path, Truth]] = {}
    root = tmp_path_factory.mktemp("sources")
    dense = write_model(root / "dense", "llama", dtype="float16")

    def source(name: str) -> tuple[Path, Truth]:
        if name not in made:
            case = CASES[name]
            made[name] = ours(root / name, dense, case) if case.format else foreign(root / name, name)
        return made[name]

    return source


def weights_of(dense: Path, scheme: QuantScheme, powers: bool = False) -> dict[str, QuantizedWeight]:
    checkpoint = open_checkpoint(dense)
    names = [name for name in checkpoint.names() if name.endswith("_proj.weight")]
    made = {}
    for seed, name in enumerate(names):
        weight = random_weight(
            *checkpoint.describe(name).shape, scheme.bits, scheme.group_size, symmetric=scheme.symmetric,
            act_order=scheme.act_order, seed=seed,
        )  # fmt: skip
        halves = torch.ldexp(torch.ones_like(weight.scales), -(weight.zeros % 5 + 4).int()).half()
        made[name.removesuffix(".weight")] = replace(weight, scales=halves) if powers else weight
    return made


def ours(root: Path, dense: Path, case: Case) -> tuple[Path, Truth]:
    assert case.scheme is not None
    weights = weights_of(dense, case.scheme, case.powers)
    output = root / ("model.gguf" if case.format == "gguf" else "model")
    settings = OutputFormat(case.format, case.scheme, ignored=("lm_head",))
    write_quantized_checkpoint(output, open_checkpoint(dense), weights, {}, settings)
    return output, {f"{module}.weight": weight.dequantize() for module, weight in weights.items()}


def foreign(root: Path, name: str) -> tuple[Path, Truth]:
    ggml = name.startswith("ggml-")
    path, dense, _ = write_gguf_pair(root, name.removeprefix("ggml-")) if ggml else write_pair(root, FOREIGN[name])
    checkpoint = open_checkpoint(dense)
    return path, {name: checkpoint.weight(name) for name in checkpoint.names() if name.endswith("_proj.weight")}


def output_of(tmp_path: Path, to: str) -> Path:
    return tmp_path / ("out.gguf" if to == "gguf" else "out")


def convert(source: Path, to: str, tmp_path: Path) -> ConvertReport:
    return convert_checkpoint(ConvertConfig(model=str(source), to=to, output=str(output_of(tmp_path, to))))


def pairs(wanted: Callable[[Case], tuple[str, ...]], default: Container[str]) -> list[Any]:
    """(source, target); by default one for each of some sources, with the target that had the fewest turns."""
    found, turns = [], dict.fromkeys(CONVERTED, 0)
    for name, case in CASES.items():
        targets = wanted(case)
        chosen = min(targets, key=turns.__getitem__, default="") if name in default else ""
        turns |= {chosen: turns[chosen] + 1} if chosen else {}
        for to in targets:
            marks = () if to == chosen else (pytest.mark.slow,)
            found.append(pytest.param(name, to, marks=marks, id=f"{name}-to-{to}"))
    return found


@pytest.mark.parametrize(("name", "to"), pairs(lambda case: case.held, BY_DEFAULT))
def test_the_numbers_are_the_same(name: str, to: str, make: Make, tmp_path: Path) -> None:
    source, truth = make(name)
    report = convert(source, to, tmp_path)
    made, before = open_checkpoint(output_of(tmp_path, to)), open_checkpoint(source)
    assert made.quantization is not None
    assert report.format == (made.quantization.checkpoint_format if to.startswith("gptq") else to)
    for weight, expected in truth.items():
        found = made.weight(weight)
        assert isinstance(found, QuantizedWeight)
        assert torch.equal(found.dequantize(), expected), weight
    for weight in set(made.names()) - truth.keys():
        assert torch.equal(plain(made.weight(weight)), plain(before.weight(weight))), weight
    assert sum(report.schemes.values()) == len(truth)
    assert report.compared == len(before.names()) - sum(report.left_out.values())


def plain(weight: torch.Tensor | QuantizedWeight) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight.float()


def not_held(case: Case) -> tuple[str, ...]:
    either = {"gptq", "gptq_v2"} if {"gptq", "gptq_v2"} & set(case.held) else set()
    foreign = set() if case.format else {"gguf"}  # their models have no tokenizer
    return tuple(to for to in CONVERTED if to not in {*case.held, *either, *foreign} and not also_held(case, to))


def also_held(case: Case, to: str) -> bool:
    """A combination that is not worth a test of its own."""
    return to == "gptq_v2" and "gptq" in case.held


@pytest.mark.parametrize(("name", "to"), pairs(not_held, REFUSED_BY_DEFAULT))
def test_what_a_format_cannot_hold_is_refused(name: str, to: str, make: Make, tmp_path: Path) -> None:
    source, _ = make(name)
    with pytest.raises(UsageError, match=f"^--to {to}") as caught:
        convert(source, to, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_target_is_tried_by_default() -> None:
    chosen = pairs(lambda case: case.held, BY_DEFAULT)
    assert {p.values[1] for p in chosen if not p.marks} == set(CONVERTED)


@pytest.mark.parametrize(
    ("name", "to", "said"),
    [
        ("awq", "gguf", r"max \|delta w\| \d.*e?-?\d* in model\.layers\.\d\..*_proj: float16 cannot hold its minimums"),
        ("ggml-Q6_K", "gptq", r"max \|delta w\| .* in model\.layers\..*: float16 cannot hold its scales"),
        ("ggml-Q6_K", "awq", r"4 bits only, found 8; .* \(codes of 5 and 6 bits would be written as 8\)"),
        ("gptq-act-order", "awq", "no g_idx"),
        ("gptq-act-order", "compressed-tensors", "no act-order groups any more"),
        ("gptq-8", "awq", "4 bits only, found 8"),
        ("gptq-3", "compressed-tensors", "read at 4 and 8 bits, found 3"),
        ("fp8-blocks", "gptq", "integers with integer zeros only, found fp8_e4m3"),
    ],
)
def test_a_refusal_says_which_numbers(name: str, to: str, said: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        convert(make(name)[0], to, tmp_path)


def mixed(dense: Path, root: Path) -> tuple[Path, dict[str, QuantizedWeight]]:
    """A GPTQ checkpoint whose v_proj have 8 bits, and whose o_proj of layer 1 is dense."""
    eight = {m: w for m, w in weights_of(dense, EIGHT).items() if m.endswith("v_proj")}
    weights = {**weights_of(dense, FOUR), **eight}
    dropped = "model.layers.1.self_attn.o_proj"
    weights.pop(dropped)
    settings = OutputFormat("gptq", FOUR, dict.fromkeys(eight, EIGHT), ignored=("lm_head", dropped))
    return write_quantized_checkpoint(root / "mixed", open_checkpoint(dense), weights, {}, settings), weights


@pytest.mark.parametrize("to", ["gptq", "compressed-tensors", "gguf"])
def test_modules_keep_their_own_schemes(to: str, tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", "llama", dtype="float16")
    source, weights = mixed(dense, tmp_path)
    report = convert(source, to, tmp_path)
    made = open_checkpoint(output_of(tmp_path, to))
    for module, weight in weights.items():
        found = made.weight(f"{module}.weight")
        assert isinstance(found, QuantizedWeight)
        assert found.scheme == weight.scheme
        assert torch.equal(found.dequantize(), weight.dequantize())
    assert made.describe("model.layers.1.self_attn.o_proj.weight").quant is None
    assert report.schemes == {"4 bits, symmetric, groups of 32": 11, "8 bits, symmetric, groups of 32": 2}
    if to != "gguf":
        assert made.quantization is not None
        config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert "model.layers.1.self_attn.o_proj" in json.dumps(config).replace("\\", "")
    with pytest.raises(UsageError, match=r"awq has one scheme for all modules: 4 bits.* but 8 bits"):
        convert(source, "awq", tmp_path / "other")


def test_the_tokenizer_goes_along(make: Make, tmp_path: Path) -> None:
    source, _ = make("gptq")
    convert(source, "gguf", tmp_path)
    convert_checkpoint(ConvertConfig(str(tmp_path / "out.gguf"), "gptq", str(tmp_path / "back")))
    before, after = Tokenizer.from_folder(source), Tokenizer.from_folder(tmp_path / "back")
    for text in ("the quick brown fox", "<|im_start|>user\nÜber 東京<|im_end|>", "  x\t\n"):
        assert before.encode(text) == after.encode(text)
    assert after.chat_template is not None
    assert before.chat_template is not None
    assert after.chat_template.source == before.chat_template.source
    assert before.eos_token_ids <= after.eos_token_ids


def test_an_embedding_becomes_dense_in_what_holds_it(make: Make, tmp_path: Path) -> None:
    report = convert(make("ggml-Q4_0")[0], "gptq", tmp_path)
    assert report.widened == {"model.embed_tokens.weight": "float32"}


def test_the_config_is_the_new_formats_alone(make: Make, tmp_path: Path) -> None:
    source, _ = make("ct-w4-g32-asym")
    assert "compression_config" in json.loads((source / "config.json").read_text())
    convert(source, "awq", tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "compression_config" not in config
    assert config["quantization_config"]["quant_method"] == "awq"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"to": "exl2"}, "--to exl2: expected one of awq, gptq"),
        ({"to": ""}, "--to is missing: expected one of awq, gptq"),
        ({"output": ""}, "--output is missing"),
        ({"output": "a/out.gguf", "to": "awq"}, "awq is a folder"),
        ({"to": "gguf"}, "gguf is one file, NAME.gguf"),
        ({"output": "."}, "exists already"),
    ],
    ids=str,
)
def test_options_are_checked(
    changes: dict[str, str], said: str, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        convert_checkpoint(replace(ConvertConfig(str(make("gptq")[0]), "awq", "out"), **changes))
    assert list(tmp_path.iterdir()) == []


def test_a_dense_checkpoint_is_sent_to_quantize(tmp_path: Path) -> None:
    dense = write_model(tmp_path / "dense", "llama")
    with pytest.raises(UsageError, match=r"is not quantized.*llmctl quantize --model .* --output out"):
        convert_checkpoint(ConvertConfig(str(dense), "awq", "out"))


def test_what_does_not_read_back_the_same_does_not_appear(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison is of what was written: a packer that is wrong is caught."""
    real = FORMATS["gptq"]

    def wrong(weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        return {**real.pack(weight), "qweight": real.pack(weight)["qweight"] ^ 1}

    monkeypatch.setitem(FORMATS, "gptq", replace(real, pack=wrong))  # type: ignore[misc]
    with pytest.raises(UsageError, match=r"max \|delta w\| .*: the format rounds its numbers"):
        convert(make("awq-symmetric")[0], "gptq", tmp_path)
    assert list(tmp_path.iterdir()) == []
