"""``llmctl eval`` as it is typed: figures, protocol, gates."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from random_models import write_model
from scored_texts import compare, perplexity
from typer.testing import CliRunner

from llmctl.artifact.builder import build_engine
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.cli.main import app
from llmctl.config import BuildConfig, QuantizeConfig
from llmctl.evaluate.perplexity import Protocol
from llmctl.quantize.driver import quantize_checkpoint
from llmctl.text.tokenizer import Tokenizer

RECIPE = Path(__file__).parents[2] / "configs" / "eval" / "ci-gate.yaml"
TEXT = "the quick brown fox reads a book and the answer is that every question has an answer of its own. " * 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense``, ``rtn`` made of it at 8 bits, and ``text.txt``."""
    root = tmp_path_factory.mktemp("eval")
    write_model(root / "dense", "llama", num_hidden_layers=1)
    config = QuantizeConfig(str(root / "dense"), str(root / "rtn"), method="rtn", bits=8, group_size=-1, symmetric=True)
    quantize_checkpoint(config)
    (root / "text.txt").write_text(TEXT)
    return root


def run(root: Path, model: str, *args: str) -> tuple[int, str, str]:
    text = ["--text", str(root / "text.txt"), "--context", "32"]
    result = CliRunner().invoke(app, ["eval", str(root / model), *text, *args])
    return result.exit_code, result.stdout, result.stderr


def test_a_perplexity_with_its_protocol(root: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("stride: 16\nmax-tokens: 100\n")
    code, out, err = run(root, "dense", "--config", str(recipe), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["perplexity"] == pytest.approx(
        perplexity(open_checkpoint(root / "dense"), TEXT, Protocol(32, 16, 100))
    )
    tokens = Tokenizer.from_folder(root / "dense").encode(TEXT, add_special_tokens=False)[:100]
    assert found["protocol"] == {
        "text": str(root / "text.txt"),
        "tokens": 100,
        "text_sha256": hashlib.sha256(np.array(tokens, np.int32).tobytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((root / "dense" / "tokenizer.json").read_bytes()).hexdigest(),
        "context": 32,
        "stride": 16,
        "windows": 6,
        "scored_tokens": 99,
    }
    assert found["gates"] == []
    assert "kl" not in found
    assert "layers of the model 100%" in err
    assert "tokens scored 100%" in err


def test_one_model_against_another(root: Path) -> None:
    code, out, _ = run(root, "rtn", "--against", str(root / "dense"), "--windows", "3", "--json")
    found = json.loads(out)
    assert code == 0
    assert 0 < found["kl_error"] < found["kl"] < 0.1
    assert found["delta_nll"] == pytest.approx(found["nll"] - found["original_nll"], abs=1e-9)
    assert found["protocol"]["stride"] is None
    assert found["protocol"]["scored_tokens"] == 3 * 31
    dense, rtn = (open_checkpoint(root / name) for name in ("dense", "rtn"))
    one = json.loads(run(root, "rtn", "--against", str(root / "dense"), "--max-tokens", "32", "--json")[1])
    assert one["kl"] == pytest.approx(compare(dense, rtn, TEXT, Protocol(32, 32, 32)).kl)
    assert one["kl_error"] is one["delta_nll_error"] is None


def test_a_table_whole_at_80_columns(root: Path) -> None:
    code, out, _ = run(root, "rtn", "--against", str(root / "dense"), "--config", str(RECIPE), "--windows", "2")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    for said in (
        "2 windows of 32 tokens",
        "spread evenly",
        "perplexity",
        "ΔNLL",
        "±",
        "KL(against || model)",
        "passed",
    ):
        assert said in words
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


@pytest.mark.parametrize(
    "gate", [("--max-kl", "1e-9"), ("--max-delta-nll", "-9"), ("--min-agreement", "100%", "--max-kl", "0")]
)
def test_a_gate_that_fails_is_exit_code_four(gate: tuple[str, ...], root: Path) -> None:
    code, out, err = run(root, "rtn", "--against", str(root / "dense"), *gate, "--json")
    assert code == 4
    assert [g["passed"] for g in json.loads(out)["gates"]].count(False) >= 1
    assert "gate failed: " in err


def test_int8_activations_are_of_the_model_that_is_judged(root: Path) -> None:
    against = ("--against", str(root / "rtn"), "--json")
    plain, rounded = (json.loads(run(root, "rtn", *against, *more)[1]) for more in ((), ("--activations", "int8")))
    assert plain["kl"] == 0
    assert 0 < rounded["kl"] < 0.1
    assert rounded["arithmetic"] == "float32, int8 activations"


def test_an_engine_is_judged_as_it_was_built(root: Path, tmp_path: Path) -> None:
    build_engine(BuildConfig(str(root / "dense"), str(tmp_path / "engine"), target="reference", dtype="bfloat16"))
    code, out, _ = run(root, str(tmp_path / "engine"), "--against", str(root / "dense"), "--json")
    found = json.loads(out)
    assert code == 0
    assert found["arithmetic"] == "bfloat16 engine for reference"
    assert 0 < found["kl"] < 0.1
    code, _, err = run(root, str(tmp_path / "engine"), "--activations", "int8")
    assert (code, "is an engine" in err) == (2, True)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--max-kl", "0.1"], "--max-kl: is of two models (fix: name the other one: --against MODEL)"),
        (["--against", "{dense}", "--max-kl", "nan"], "--max-kl: expected a finite number"),
        (["--against", "{dense}", "--min-agreement", "95"], "--min-agreement: expected a share up to 100%"),
        (["--context", "129"], "--context 129: the longest context is 128"),
        (["--windows", "2", "--stride", "3"], "not both"),
        (["--windows", "99"], "99 windows of 32 tokens need 3168 tokens"),
        (["--stride", "33"], "stride 33: expected 1 to the context, 32"),
        (["--max-tokens", "1"], "--max-tokens 1: expected at least 2"),
        (["--activations", "int4"], "--activations: expected auto or int8"),
        (["--text", "none"], "--text none: No such file"),
        (["--text", "{root}/no.txt"], "no.txt: No such file or directory (fix: name a text file, or builtin)"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_two(args: list[str], said: str, root: Path) -> None:
    code, out, err = run(root, "rtn", *(a.format(dense=root / "dense", root=root) for a in args))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize("change", ["spelling", "vocabulary", "merges"])
def test_models_compare_where_token_ids_mean_the_same(change: str, root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "dense", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    document = json.loads(path.read_text())
    if change == "vocabulary":
        ids = document["model"]["vocab"]
        ids["q"], ids["Q"] = ids["Q"], ids["q"]
    elif change == "merges":
        document["model"]["merges"] = []
    path.write_text(json.dumps(document, indent=3))
    code, _, err = run(root, "dense", "--against", str(tmp_path / "other"), "--json")
    assert (code, "has another tokenizer" in err) == ((0, False) if change == "spelling" else (2, True))


def test_a_gguf_file_against_what_it_was_made_from(root: Path, tmp_path: Path) -> None:
    made = tmp_path / "rtn.gguf"
    quantize_checkpoint(
        QuantizeConfig(str(root / "dense"), str(made), method="rtn", bits=8, group_size=32, format="gguf")
    )
    code, out, err = run(root, str(made), "--against", str(root / "dense"), "--json")
    assert code == 0, err
    assert 0 < json.loads(out)["kl"] < 0.1


def test_tokens_that_the_model_does_not_have(root: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", "llama", num_hidden_layers=1, vocab_size=8)
    code, _, err = run(root, str(small))
    assert (code, "the tokenizer gives id" in err) == (2, True)
