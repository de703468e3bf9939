"""engine.json is canonical, and any change to it is seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmctl.artifact.loader import read_manifest
from llmctl.artifact.manifest import (
    MANIFEST_NAME,
    ManifestError,
    SourceModel,
    manifest_from_bytes,
    manifest_to_bytes,
    source_argument,
)
from llmctl.targets.base import TargetName


def test_round_trip(built: Path) -> None:
    raw = (built / MANIFEST_NAME).read_bytes()
    assert manifest_to_bytes(manifest_from_bytes(raw)) == raw


def test_holds_no_absolute_path(built: Path) -> None:
    assert str(built.parent) not in (built / MANIFEST_NAME).read_text()
    assert b"/tmp" not in (built / MANIFEST_NAME).read_bytes()


def test_any_flipped_byte_is_seen(built: Path) -> None:
    raw = (built / MANIFEST_NAME).read_bytes()
    rng = np.random.default_rng(0)
    for at, bit in zip(rng.integers(0, len(raw), 60), rng.integers(0, 8, 60), strict=True):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << bit
        with pytest.raises(ManifestError) as error:
            manifest_from_bytes(bytes(damaged))
        assert "\n" not in str(error.value)


def test_whitespace_only_change_is_seen(built: Path) -> None:
    raw = (built / MANIFEST_NAME).read_bytes()
    with pytest.raises(ManifestError, match="its bytes are not what llmctl writes"):
        manifest_from_bytes(json.dumps(json.loads(raw)).encode())


@pytest.mark.parametrize("raw", [b"", b"null", b"[1]", b"\xff\xfe", b"{" * 5000, b'{"format_version": true}'])
def test_not_a_manifest(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        manifest_from_bytes(raw)


WHERE = ", where MODEL is the path or hub id of 'gptq', which it was built from"


def test_the_model_of_a_rebuild_is_where_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that names what is not there could not work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "work" / "its model").mkdir(parents=True)
    engine = tmp_path / "work" / "engine"
    assert source_argument("here", engine) == ("here", "")
    assert source_argument("its model", engine) == (f"'{tmp_path}/work/its model'", "")
    assert source_argument("its model", Path("work/engine")) == ("'work/its model'", "")
    assert source_argument("gptq", engine) == ("MODEL", WHERE)
    assert source_argument("demo:smollm2-135m", engine) == ("demo:smollm2-135m", "")
    assert source_argument("org/name", engine) == ("org/name", "")
    assert source_argument("a/b; true", engine) == ("'a/b; true'", "")
    assert source_argument("demo:x y", engine) == ("'demo:x y'", "")
    assert SourceModel("org/name", "", "llama").argument(engine) == ("org/name --as llama", "")


def test_records_what_the_design_asks_for(built: Path) -> None:
    manifest = read_manifest(built)
    assert manifest.source.name == "gptq"
    assert len(manifest.source.fingerprint) == 64
    assert (manifest.quantization.method, manifest.quantization.bits, manifest.quantization.group_size) == (
        "gptq",
        4,
        32,
    )
    assert manifest.quantization.ignored_layers == ("lm_head.weight",)
    assert {choice.op for choice in manifest.kernels} == {op.name for op in manifest.graph.ops}
    assert set(manifest.files) == {
        "generation_config.json", "tokenizer.json", "weights-00001-of-00001.safetensors",
    }  # fmt: skip
    command = manifest.rebuild_command("./e", max_model_len=8)
    assert command == (
        f"llmctl build --model MODEL --target cpu --dtype float32 --max-model-len 8 --block-size 16 --output ./e{WHERE}"
    )
    changed = replace(
        manifest.options, kv_cache_dtype="int8", dtype="float16", passes=(*manifest.options.passes, "int8_activations")
    )
    other = replace(manifest, options=changed, target=TargetName("cuda", ("sm_90",)))
    assert "--kv-cache-dtype int8 --activations int8" in other.rebuild_command("./e")
    assert other.rebuild_command("./e", target="cpu") == (
        f"llmctl build --model MODEL --target cpu --max-model-len 256 --block-size 16 --output ./e{WHERE}"
    )
    same_kind = other.rebuild_command("./e", target="cuda:sm_80")
    assert "--target cuda:sm_80 --dtype float16" in same_kind
    assert "--kv-cache-dtype int8 --activations int8" in same_kind


def test_another_dtype_has_another_head(native: Path) -> None:
    manifest = read_manifest(native)
    assert "--dtype bfloat16" in (same := manifest.rebuild_command("./e"))
    assert "--lm-head int8" in same
    assert "--lm-head" not in manifest.rebuild_command("./e", dtype="float32")
    assert "--lm-head" not in manifest.rebuild_command("./e", target="reference")
