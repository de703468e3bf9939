"""Building: same bytes every time, weights that are the checkpoint's, all or nothing, and nothing foreign replaced."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import share_compiled_kernels
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tiny_checkpoint import dense_tensors, write_arrays, write_dense, write_gptq

from llmctl.artifact import builder, writer
from llmctl.artifact.builder import build_engine, engine_target, ensure_engine
from llmctl.artifact.loader import LoadedEngine, load_engine, read_manifest
from llmctl.artifact.plan import plan_build
from llmctl.checkpoint.assemble import assemble
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.safetensors_io import plane_bytes
from llmctl.config import BuildConfig, EngineOptions
from llmctl.errors import CheckpointError, ModelNotFoundError, UsageError
from llmctl.graph.graph import QuantScheme
from llmctl.targets.cpu.toolchain import INSTALL_HINT, find_compiler
from llmctl.targets.plain import code_bytes, pack_fields, unpack_fields
from llmctl.targets.reference.target import ReferenceTarget
from llmctl.targets.table import DefaultTarget, parse_target


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def build(model: Path, output: Path, **options: object) -> Path:
    return build_engine(BuildConfig(model=str(model), output=str(output), **options))  # type: ignore[arg-type]


def test_same_inputs_same_bytes(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(checkpoints["gptq"], tmp_path / "a", target="reference")
    moved = tmp_path / "elsewhere" / "gptq"
    write_gptq(moved)
    monkeypatch.chdir(moved.parent)
    second = build(Path("gptq"), tmp_path / "deep" / "b", target="reference")
    assert hashes(first) == hashes(second)


def test_several_weight_files(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_SHARD_BYTES", 20_000)
    engine = load_engine(build(checkpoints["dense"], tmp_path / "e", target="reference"), verify=True)
    files = engine.manifest.weight_files
    assert len(files) > 2
    assert files[0] == f"weights-00001-of-{len(files):05d}.safetensors"
    check_dense(engine, checkpoints["dense"])


def check_dense(engine: LoadedEngine, checkpoint: Path) -> None:
    source = open_checkpoint(checkpoint)
    for name, weight in engine.graph.weights.items():
        plane = engine.weights[name]
        expected = assemble(weight, source).numpy()
        np.testing.assert_array_equal(plane.data.astype(np.float32), expected.astype(np.float32))


def test_reference_engine_keeps_the_checkpoints_dtype(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    engine = load_engine(build(checkpoints["dense"], tmp_path / "e", target="reference"))
    assert engine.manifest.options.dtype == "float32"
    assert {plane.dtype for plane in engine.weights.values()} == {"F16"}
    check_dense(engine, checkpoints["dense"])


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_without_a_compiler_a_cpu_engine_is_for_torch(
    checkpoints: dict[str, Path],
    tmp_path: Path,
    dtype: str,
    stored: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    monkeypatch.setattr("llmctl.targets.cpu.target.find_compiler", lambda: None)
    engine = load_engine(build(checkpoints["dense"], tmp_path / "e", target="cpu", dtype=dtype))
    assert {plane.dtype for plane in engine.weights.values()} == {stored}
    assert "warning: no C++ compiler found" in capsys.readouterr().err
    plane, weight = engine.weights["lm_head.weight"], engine.graph.weights["lm_head.weight"]
    expected = assemble(weight, open_checkpoint(checkpoints["dense"])).to(getattr(torch, dtype))  # type: ignore[union-attr]
    assert plane.data.tobytes() == expected.contiguous().view(torch.uint8).numpy().tobytes()


def unpacked(packed: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Fields of 8, 4, 2 and 1 bits, one kind after the other -> [N, K]."""
    codes, at, start = np.zeros((len(packed), columns), np.uint8), 0, 0
    for width in (width for width in (8, 4, 2, 1) if bits & width):
        size = -(-columns * width // 8)
        stream = np.unpackbits(packed[:, start : start + size], axis=1, bitorder="little")[:, : columns * width]
        field = stream.reshape(len(packed), columns, width) @ (1 << np.arange(width))
        codes |= (field << at).astype(np.uint8)
        at, start = at + width, start + size
    assert start == packed.shape[1]
    return codes


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, False), (3, 64, True), (8, -1, False)])
def test_quantized_planes(tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    model = write_gptq(tmp_path / "m", bits=bits, group_size=group_size, symmetric=symmetric)
    engine = load_engine(build(model, tmp_path / "e", target="reference"))
    source = open_checkpoint(model)
    quantized = [w for w in engine.graph.weights.values() if w.quant is not None]
    assert len(quantized) == 2 * 4
    for weight in quantized:
        expected = assemble(weight, source)
        assert isinstance(expected, QuantizedWeight)
        codes = engine.weights[f"{weight.name}.codes"].data
        assert codes.shape[1] * 8 == weight.shape[1] * bits
        np.testing.assert_array_equal(unpacked(codes, bits, weight.shape[1]), expected.codes.numpy())
        np.testing.assert_array_equal(engine.weights[f"{weight.name}.scales"].data, expected.scales.numpy())
        assert (f"{weight.name}.zeros" in engine.weights) == (not symmetric)
        if not symmetric:
            np.testing.assert_array_equal(engine.weights[f"{weight.name}.zeros"].data, expected.zeros.numpy())


@given(
    hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=19), elements=st.integers(0, 255)),
    st.sampled_from((2, 3, 4, 5, 6, 8)),
)
def test_codes_are_stored_by_their_bits(codes: np.ndarray, bits: int) -> None:
    codes = codes & np.uint8((1 << bits) - 1)
    packed, columns = pack_fields(codes, bits), codes.shape[1]
    assert packed.shape == (len(codes), code_bytes(QuantScheme(bits, -1, symmetric=True), columns))
    np.testing.assert_array_equal(unpacked(packed, bits, columns), codes)
    np.testing.assert_array_equal(unpack_fields(torch.from_numpy(packed), bits, columns).numpy(), codes)


def test_an_engine_is_replaced(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    output = build(checkpoints["dense"], tmp_path / "e", max_model_len=64)
    (output / "stray").write_text("left by hand")
    build(checkpoints["gptq"], output, max_model_len=128)
    assert load_engine(output, verify=True).sizes.max_model_len == 128
    assert not (output / "stray").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("kind", ["file", "folder", "other json", "link", "engine and checkpoint"])
def test_anything_else_is_left_alone(checkpoints: dict[str, Path], tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("mine")
    elif kind == "link":
        (tmp_path / "target").mkdir()
        output.symlink_to(tmp_path / "target")
    elif kind == "engine and checkpoint":
        build(checkpoints["dense"], output)
        shutil.copyfile(checkpoints["dense"] / "config.json", output / "config.json")
    else:
        output.mkdir()
        (output / ("engine.json" if kind == "other json" else "notes.txt")).write_text('{"mine": 1}')
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="exists and is not an llmctl engine; it is left alone"):
        build(checkpoints["dense"], output)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_an_empty_folder_is_taken(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    load_engine(build(checkpoints["dense"], tmp_path / "e"))


def test_a_failing_build_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def fail(_name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise CheckpointError("planted")

    old = build(checkpoints["dense"], tmp_path / "e")
    before = hashes(old)
    config = BuildConfig(model=str(checkpoints["gptq"]), output=str(old))
    with pytest.raises(CheckpointError, match="planted"):
        build_engine(config, fail)
    assert hashes(old) == before
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def pack_all(model: Path, target: str, **options: object) -> None:
    """All that a build does with weights, without what it compiles."""
    plan = plan_build(BuildConfig(model=str(model), target=target, **options))  # type: ignore[arg-type]
    specs = writer._WeightWriter(plan, lambda *_: None).tensors(list(plan.planes))
    for *_, content in specs.values():
        plane_bytes(content)


@pytest.mark.parametrize("target", ["reference", "cpu:portable", "cuda:sm_80"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, target: str, value: float) -> None:
    tensors = dense_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    model = write_arrays(tmp_path / "model", tensors)
    said = r"'model\.layers\.1\.mlp\.up_proj\.weight': 1 of 8192 values are not finite"
    with pytest.raises(CheckpointError, match=said):
        pack_all(model, target)
    with pytest.raises(CheckpointError, match=said):
        build(model, tmp_path / "engine", target="reference")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("target", ["reference", "cuda:sm_80"])
def test_weights_beyond_the_compute_dtype_are_named(tmp_path: Path, target: str) -> None:
    tensors = {name: array.astype(np.float32) for name, array in dense_tensors().items()}
    tensors["model.layers.1.input_layernorm.weight"][3] = 1e6
    model = write_arrays(tmp_path / "model", tensors)
    with pytest.raises(CheckpointError, match=r"input_layernorm\.weight': a value of 1e\+06 is too large for float16"):
        pack_all(model, target, dtype="float16")
    pack_all(model, target, dtype="bfloat16")


@pytest.mark.parametrize("target", ["reference", "cpu:portable", "cuda:sm_80"])
def test_an_own_head_beside_tied_embeddings_is_built_in(tmp_path: Path, target: str) -> None:
    model = write_arrays(tmp_path / "model", dense_tensors(), tie_word_embeddings=True)
    plan = plan_build(BuildConfig(model=str(model), target=target))
    assert plan.graph.ops[-1].weights[0] == "lm_head.weight"
    assert {"lm_head.weight", "embed.weight"} <= plan.planes.keys()


def test_what_a_killed_build_left_is_removed(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=os._exit, args=(0,))
    process.start()
    process.join()
    abandoned = tmp_path / f".e.tmp-{process.pid}"
    abandoned.mkdir()
    build(checkpoints["dense"], tmp_path / "e")
    assert not abandoned.exists()


def test_progress_counts_every_byte_once(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    config = BuildConfig(model=str(checkpoints["gptq"]), output=str(tmp_path / "e"))
    build_engine(config, lambda *step: seen.append(step))
    done = [step[1] for step in seen]
    assert done == sorted(done)
    assert done[-1] == seen[-1][2]
    assert {step[0] for step in seen} == set(read_manifest(tmp_path / "e").graph.weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tpu"}, "--target: expected one of cpu, cpu:VARIANT"),
        ({"target": "cuda"}, "--target cuda: expected some of sm_80"),
        ({"target": "reference:sm_80"}, "--target reference: expected no architecture, found 'sm_80'"),
        ({"target": "cuda:sm_70"}, "found 'sm_70'"),
        (
            {"target": "cpu:sm_80"},
            "--target cpu: expected some of amx, avx512bf16, avx512vnni, avx2, portable, found 'sm_80'",
        ),
        ({"dtype": "int4"}, "--dtype: expected one of auto"),
        ({"target": "cuda:sm_80", "dtype": "float32"}, "expected float16 or bfloat16 for a cuda target"),
        ({"block_size": 12}, "--block-size: expected a power of two, found 12"),
        ({"max_model_len": 0}, "--max-model-len: expected at least 1"),
        ({"max_model_len": 513}, "--max-model-len: expected at most 512"),
        ({"kv_cache_dtype": "int2"}, "--kv-cache-dtype: expected one of"),
        ({"kv_cache_dtype": "float16"}, "--kv-cache-dtype: expected one of auto, bfloat16, float32, int8 for a cpu"),
        ({"dtype": "float16"}, "--dtype: expected bfloat16 or float32 for a cpu target"),
        (
            {"lm_head": "int8", "target": "cuda:sm_80"},
            "--lm-head: expected auto or dense for a cuda target, found 'int8'",
        ),
        ({"lm_head": "int4", "target": "reference"}, "--lm-head: expected auto or dense for a reference target"),
        ({"lm_head": "int8", "dtype": "float32"}, "--lm-head: expected auto or dense for a float32 engine"),
        (
            {"target": "cuda:sm_80", "dtype": "bfloat16", "kv_cache_dtype": "float16"},
            "bfloat16, int8, fp8 for a cuda target that computes in bfloat16, found 'float16'",
        ),
        ({"activations": "int4"}, "--activations: expected auto or int8, found 'int4'"),
        ({"activations": "int8"}, "--activations: expected auto for a cpu target"),
        (
            {"activations": "int8", "target": "cuda:sm_80"},
            "the model has no linear of symmetric weights of 5 to 8 bits",
        ),
        ({"passes": ("int8_activations",)}, "--passes: expected none, or some of merge_qkv"),
        ({"passes": ("fuse_all",)}, "--passes: expected none, or some of"),
        ({"memory_budget": "lots"}, "--memory-budget: expected a size"),
        ({"output": ""}, "--output: the folder to write is missing"),
        ({"model": ""}, "--model is required"),
    ],
)
def test_bad_options(checkpoints: dict[str, Path], tmp_path: Path, options: dict[str, object], message: str) -> None:
    settings = {"model": str(checkpoints["dense"]), "output": str(tmp_path / "e"), **options}
    with pytest.raises(UsageError) as error:
        build_engine(BuildConfig(**settings))  # type: ignore[arg-type]
    assert message in str(error.value)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("option", "value"), [("kv_cache_dtype", "int8"), ("lm_head", "int8"), ("lm_head", "int4")])
def test_what_only_the_native_kernels_do_needs_a_compiler(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    monkeypatch.setattr("llmctl.targets.cpu.target.find_compiler", lambda: None)
    with pytest.raises(UsageError) as error:
        plan_build(BuildConfig(model=str(checkpoints["gptq"]), **{option: value}))  # type: ignore[arg-type]
    assert error.value.message.startswith(f"--{option.replace('_', '-')} {value}: expected a C++ compiler")
    assert error.value.fix == INSTALL_HINT
    assert plan_build(BuildConfig(model=str(checkpoints["gptq"]))).options.lm_head == "dense"


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler on this machine")
def test_a_head_that_the_checkpoint_quantizes_is_left_alone(tmp_path: Path) -> None:
    config = BuildConfig(model=str(write_gptq(tmp_path / "m", head=True)))
    plan = plan_build(config)
    assert plan.options.lm_head == "dense"
    assert {choice.op: choice.kernel for choice in plan.choices}["lm_head"] == "w4a8"
    with pytest.raises(UsageError, match="expected auto or dense for a checkpoint whose output head is quantized"):
        plan_build(replace(config, lm_head="int8"))


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        build(tmp_path / "nothing", tmp_path / "e")


@pytest.mark.parametrize(
    ("target", "dtype"), [("reference", "float32"), ("cuda:sm_80", "float16"), ("cpu:portable", "bfloat16")]
)
def test_each_target_has_its_own_auto_dtype(checkpoints: dict[str, Path], target: str, dtype: str) -> None:
    assert plan_build(BuildConfig(model=str(checkpoints["dense"]), target=target)).options.dtype == dtype


def test_architectures_are_named_once_and_in_order() -> None:
    assert str(parse_target("cuda:sm_120,sm_80,sm_80").name) == "cuda:sm_80,sm_120"


def test_passes_can_be_left_out(checkpoints: dict[str, Path]) -> None:
    model = str(checkpoints["dense"])
    assert plan_build(BuildConfig(model=model, passes=("none",))).graph.passes == ()
    assert plan_build(BuildConfig(model=model, passes=("merge_qkv",))).graph.passes == ("merge_qkv",)


@pytest.mark.parametrize(
    ("asked", "found", "tag", "token_bytes"),
    [
        ("auto", "float16", "f16", 2 * 2 * 16 * 2),
        ("fp8", "fp8_e4m3", "e4m3", 2 * 2 * 16),
        ("int8", "int8", "s8", 2 * 2 * (16 + 4)),
    ],
)
def test_the_kv_cache_has_its_dtypes_kernels_and_size(
    checkpoints: dict[str, Path], asked: str, found: str, tag: str, token_bytes: int
) -> None:
    plan = plan_build(
        BuildConfig(model=str(checkpoints["gptq"]), target="cuda:sm_90", dtype="float16", kv_cache_dtype=asked)
    )
    assert plan.options.kv_cache_dtype == found
    assert f"rope_kv_f16_{tag}" in {entry for choice in plan.choices for entry in choice.entries}
    assert plan.memory.kv_per_token == plan.graph.num_layers * token_bytes


def test_int8_activations_choose_their_kernels(tmp_path: Path) -> None:
    model = write_gptq(tmp_path / "w8", bits=8, symmetric=True)
    plan = plan_build(BuildConfig(model=str(model), target="cuda:sm_90", activations="int8"))
    kernels = {choice.op: choice.kernel for choice in plan.choices}
    layers = [op.name for op in plan.graph.linears() if op.name != "lm_head"]
    assert {kernels[name] for name in layers} == {"w8a8"}
    assert "int8_activations" in plan.options.passes
    assert {"rms_norm_s8_f16", "add_rms_norm_s8_f16", "quantize_s8_f16", "w8a8_gemm_f16_t8"} <= {
        entry for choice in plan.choices for entry in choice.entries
    }
    assert "w8a16_gemm.cu" not in {source for choice in plan.choices for source in choice.sources}


class TestEnsureEngine:
    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("LLMCTL_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_an_engine_is_itself(self, built: Path, cache: Path) -> None:
        assert ensure_engine(str(built), EngineOptions()) == built
        assert not cache.exists()

    def test_a_checkpoint_is_built_once(
        self, checkpoints: dict[str, Path], cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = str(checkpoints["dense"])
        first = ensure_engine(model, EngineOptions(target="reference"))
        assert f"building dense for reference into {first}" in capsys.readouterr().err
        assert first.parent == cache / "engines"
        before = (first / "engine.json").stat().st_mtime_ns
        assert ensure_engine(model, EngineOptions(target="reference", max_model_len=32)) == first
        assert (first / "engine.json").stat().st_mtime_ns == before
        assert capsys.readouterr().err == ""
        assert ensure_engine(model, EngineOptions(target="reference", dtype="bfloat16")) != first

    @pytest.mark.parametrize(
        ("target", "said"),
        [
            ("cuda:sm_90", "no NVIDIA (driver|GPU)"),
            ("cpu:avx512bf16,avx2", "expected a CPU that runs it, found one that runs .*portable"),
        ],
    )
    def test_what_cannot_run_here_is_not_built(
        self, checkpoints: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch, target: str, said: str
    ) -> None:
        monkeypatch.setattr("llmctl.targets.cpu.target.cpu_features", lambda: frozenset({"fpu"}))
        monkeypatch.setattr("llmctl.targets.cuda.target.cuda_device", lambda: None)
        with pytest.raises(UsageError, match=f"--target {target.partition(':')[0]}:.*: {said}") as error:
            ensure_engine(str(checkpoints["dense"]), EngineOptions(target=target))
        assert error.value.fix == "--target cpu"
        assert not cache.exists()

    def test_a_target_that_nobody_named(
        self,
        checkpoints: dict[str, Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setenv("LLMCTL_CACHE", str(share_compiled_kernels(tmp_path / "cache")))
        chosen = DefaultTarget("reference", ("warning: the GPU (sm_75, 8.0 GiB) is not used",))
        monkeypatch.setattr(builder, "default_target", lambda: chosen)
        options = EngineOptions(model=str(checkpoints["dense"]))
        assert str(engine_target(options).name) == "reference"
        engine = ensure_engine(options.model, options)
        assert str(read_manifest(engine).target) == "reference"
        assert capsys.readouterr().err.startswith(f"{chosen.said[0]}\nbuilding dense for reference into ")
        assert str(engine_target(EngineOptions(model=str(engine))).name) == "reference"
        assert ensure_engine(options.model, BuildConfig()) != engine  # a build is for the CPU unless it is told
        assert chosen.said[0] not in capsys.readouterr().err

    def test_a_cache_of_the_run_is_no_other_engine_where_it_can_be_switched(
        self, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = str(checkpoints["dense"])
        first = ensure_engine(model, EngineOptions(target="reference"))
        other = ensure_engine(model, EngineOptions(target="reference", kv_cache_dtype="bfloat16"))
        assert read_manifest(other).options.kv_cache_dtype == "bfloat16"
        assert other != first
        monkeypatch.setattr(ReferenceTarget, "kv_cache_dtypes", lambda *_: ("float32", "bfloat16"))
        assert ensure_engine(model, EngineOptions(target="reference", kv_cache_dtype="bfloat16")) == first

    def test_a_context_beyond_the_models_is_refused_before_anything_is_built(
        self, checkpoints: dict[str, Path], cache: Path
    ) -> None:
        options = EngineOptions(target="reference", max_model_len=10**6)
        with pytest.raises(UsageError, match=r"--max-model-len: expected at most \d+, the model's own") as error:
            ensure_engine(str(checkpoints["dense"]), options)
        assert (error.value.fix or "").startswith("--max-model-len ")
        assert not cache.exists()

    def test_what_would_be_refused_is_not_built(
        self, checkpoints: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ReferenceTarget, "run_options", frozenset())
        with pytest.raises(UsageError, match="--threads 2: expected an engine of a target that has this option, found"):
            ensure_engine(str(checkpoints["dense"]), EngineOptions(target="reference", threads=2))
        assert not cache.exists()

    def test_another_content_is_another_engine(self, tmp_path: Path) -> None:
        model = write_dense(tmp_path / "m", seed=0)
        first = ensure_engine(str(model), BuildConfig(target="reference"))
        write_dense(tmp_path / "m", seed=1)
        second = ensure_engine(str(model), BuildConfig(target="reference"))
        assert first != second
        assert read_manifest(first).source.fingerprint != read_manifest(second).source.fingerprint

    def test_a_damaged_cached_engine_is_built_again(self, checkpoints: dict[str, Path]) -> None:
        first = ensure_engine(str(checkpoints["dense"]), BuildConfig(target="reference"))
        raw = (first / "engine.json").read_bytes()
        (first / "engine.json").write_bytes(raw[: len(raw) // 2])
        assert ensure_engine(str(checkpoints["dense"]), BuildConfig(target="reference")) == first
        assert (first / "engine.json").read_bytes() == raw

    def test_two_processes_build_once(self, checkpoints: dict[str, Path]) -> None:
        context = multiprocessing.get_context("fork")
        queue = context.Queue()

        def work() -> None:
            queue.put(ensure_engine(str(checkpoints["dense"]), BuildConfig(target="reference"), record))

        def record(_name: str, done: int, total: int) -> None:
            if done == total:
                queue.put("built")

        processes = [context.Process(target=work) for _ in range(2)]
        for process in processes:
            process.start()
        results = [queue.get(timeout=60) for _ in range(3)]
        for process in processes:
            process.join(timeout=60)
        assert results.count("built") == 1
        assert len({str(r) for r in results if r != "built"}) == 1
