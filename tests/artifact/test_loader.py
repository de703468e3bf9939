"""Every way an engine folder can be wrong gives one clear line, before anything is mapped or allocated."""

from __future__ import annotations

import json
import mmap
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmctl.artifact.loader import load_engine, read_manifest
from llmctl.artifact.manifest import MANIFEST_NAME, FileRecord
from llmctl.artifact.request import EngineRequest
from llmctl.checkpoint.safetensors_io import SafetensorsFile, write_safetensors
from llmctl.errors import EngineLoadError, ExitCode, LlmctlError, ModelNotFoundError, UsageError
from llmctl.targets.base import FALLBACK, KernelChoice, KernelFile, KernelResources, TargetName
from llmctl.targets.cuda import target as cuda
from llmctl.targets.cuda.device import CudaDevice
from llmctl.targets.cuda.packing import cuda_formats

WEIGHTS = "weights-00001-of-00001.safetensors"
Edit = Callable[..., None]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Load, expecting a refusal; any mapping of a file on the way fails the test. Returns the message and the fix."""

    def load(engine: Path, *, verify: bool = False, code: ExitCode = ExitCode.RUNTIME, **request: object) -> str:
        def forbidden(*_: object, **__: object) -> None:
            raise AssertionError("a weight file was mapped before the checks had passed")

        with monkeypatch.context() as patch:
            patch.setattr(mmap, "mmap", forbidden)
            patch.setattr(np, "empty", forbidden)
            with pytest.raises(EngineLoadError) as error:
                load_engine(engine, EngineRequest(**request), verify=verify)  # type: ignore[arg-type]
        assert error.value.exit_code == code
        assert error.value.fix
        assert "llmctl build --model" in error.value.fix
        assert "\n" not in str(error.value)
        return str(error.value)

    return load


def rewrite_weights(engine: Path, edit: Edit, change: Callable[[dict[str, object]], None]) -> None:
    """Write other tensors, with sizes and hashes recorded as if they had been built so."""
    file = SafetensorsFile(engine / WEIGHTS)
    tensors: dict[str, object] = {k: (e.dtype, e.shape, file.plane(k).copy()) for k, e in file.tensors.items()}
    change(tensors)
    write_safetensors(engine / WEIGHTS, tensors)  # type: ignore[arg-type]
    record = FileRecord((engine / WEIGHTS).stat().st_size, "0" * 64)
    edit(engine, files={**read_manifest(engine).files, WEIGHTS: record})


def test_a_good_engine_loads(built: Path) -> None:
    engine = load_engine(built, verify=True)
    assert engine.sizes.max_model_len == 256
    assert engine.plan.kv_tokens >= 256
    codes = engine.weights["layers.0.o_proj.weight.codes"]
    assert (codes.dtype, codes.shape, codes.data.shape) == ("U8", (64, 32), (64, 32))
    assert not codes.data.flags.writeable
    assert engine.weights["lm_head.weight"].dtype == "F32"


def test_loading_imports_no_torch(built: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from llmctl.artifact.loader import load_engine;"
        f"load_engine(Path({str(built)!r})); print([m for m in ('torch', 'transformers', 'cupy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_not_an_engine(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"not an llmctl engine: no engine\.json"):
        load_engine(tmp_path)


def test_an_engine_that_is_a_checkpoint_as_well(engine: Path) -> None:
    (engine / "config.json").write_text("{}")
    with pytest.raises(
        EngineLoadError, match=r"expected an engine or a checkpoint, found both: engine\.json and config"
    ):
        load_engine(engine)


def test_wrong_format_version(engine: Path, refused: Callable[..., str]) -> None:
    raw = (engine / MANIFEST_NAME).read_text()
    (engine / MANIFEST_NAME).write_text(raw.replace('"format_version": 7', '"format_version": 99'))
    message = refused(engine)
    assert "format_version: expected 7, found 99" in message
    assert f" --target cpu --output {engine}" in message


def test_unknown_key(engine: Path, refused: Callable[..., str]) -> None:
    data = json.loads((engine / MANIFEST_NAME).read_text())
    data["options"]["block_sise"] = 4
    (engine / MANIFEST_NAME).write_text(json.dumps(data))
    assert "unknown key 'options.block_sise'; the nearest known one is 'block_size'" in refused(engine)


def test_unknown_key_in_the_graph(engine: Path, refused: Callable[..., str]) -> None:
    data = json.loads((engine / MANIFEST_NAME).read_text())
    data["graph"]["ops"][0]["colour"] = 1
    (engine / MANIFEST_NAME).write_text(json.dumps(data))
    assert "unknown key 'colour'" in refused(engine)


def test_edited_value(engine: Path, refused: Callable[..., str]) -> None:
    raw = (engine / MANIFEST_NAME).read_text()
    (engine / MANIFEST_NAME).write_text(raw.replace('"max_model_len": 256', '"max_model_len": 512'))
    assert "checksum: expected" in refused(engine)


def test_damaged_manifest_still_names_a_command(engine: Path, refused: Callable[..., str]) -> None:
    (engine / MANIFEST_NAME).write_bytes((engine / MANIFEST_NAME).read_bytes()[:-20])
    assert "not valid JSON" in refused(engine)


def test_truncated_weight_file(engine: Path, refused: Callable[..., str]) -> None:
    size = (engine / WEIGHTS).stat().st_size
    with (engine / WEIGHTS).open("r+b") as file:
        file.truncate(size - 1)
    assert f"{WEIGHTS}: expected {size} bytes, found {size - 1} bytes" in refused(engine)


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_missing_file(engine: Path, name: str, refused: Callable[..., str]) -> None:
    (engine / name).unlink()
    message = refused(engine)
    assert f"{name}: expected a file of" in message
    assert "found no file" in message


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json", "generation_config.json"])
def test_flipped_byte_is_seen_with_verify(engine: Path, name: str, refused: Callable[..., str]) -> None:
    raw = bytearray((engine / name).read_bytes())
    raw[-1] ^= 1
    (engine / name).write_bytes(raw)
    load_engine(engine)
    assert f"{name}: expected sha256" in refused(engine, verify=True)


def test_kernels_of_other_sources(
    native: Path, tmp_path: Path, edit_manifest: Edit, refused: Callable[..., str]
) -> None:
    """What they agree on with host code may have changed with them: numbers, layouts, arguments."""
    engine = Path(shutil.copytree(native, tmp_path / "engine"))
    edit_manifest(engine, kernel_sources={"program.cpp": "0" * 64}, llmctl_version="0.0.1")
    message = refused(engine)
    assert "kernel_sources.program.cpp: expected the source of llmctl" in message
    assert "found that of llmctl 0.0.1, 0000000000000000…" in message


def test_who_brings_kernels_of_his_own_needs_none_of_this_version(
    native: Path, tmp_path: Path, edit_manifest: Edit
) -> None:
    """While kernels are changed, an engine's weights are run on them without a build."""
    engine = Path(shutil.copytree(native, tmp_path / "engine"))
    modules = {name: replace(file, abi="0" * 16) for name, file in read_manifest(engine).kernel_files.items()}
    edit_manifest(engine, kernel_sources={"program.cpp": "0" * 64}, kernel_files=modules)
    load_engine(engine, kernels=False)
    with pytest.raises(EngineLoadError, match="abi: expected"):
        load_engine(engine)


def test_kernels_of_a_source_that_is_gone(
    engine: Path, edit_manifest: Edit, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernels(engine, edit_manifest)
    edit_manifest(engine, kernels=(KernelChoice("a", "norm", ("n",), ("renamed.cu",)),))
    monkeypatch.setattr(cuda, "cuda_device", lambda: CudaDevice((9, 0), (13, 5), 2**34))
    message = refused(engine)
    assert "kernel_sources: expected sources of llmctl" in message
    assert "renamed.cu: No such file" in message


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel source has the recorded hash: modules of these tests only look like some."""
    monkeypatch.setattr(cuda.CudaTarget, "source_hashes", lambda *_: {})


def with_kernels(
    engine: Path, edit: Edit, *, archs: tuple[str, ...] = ("sm_90",), compiler: str = "NVRTC 13.0"
) -> None:
    """Make a cuda engine of it, with a file that only looks like a module."""
    graph = read_manifest(engine).graph

    def repack(tensors: dict[str, object]) -> None:
        for weight, fmt in cuda_formats(graph).items():
            for suffix in ("codes", "scales", "zeros"):
                tensors.pop(f"{weight}.{suffix}", None)
            for suffix, (dtype, shape) in fmt.planes().items():
                tensors[f"{weight}.{suffix}"] = (dtype, shape, np.zeros(shape, {"U8": "u1", "F16": "f2"}[dtype]))

    rewrite_weights(engine, edit, repack)
    manifest = read_manifest(engine)
    (engine / "kernels").mkdir()
    modules, files = {}, dict(manifest.files)
    import hashlib

    for arch in archs:
        name = f"kernels/{arch}/norm.cubin"
        (engine / name).parent.mkdir()
        (engine / name).write_bytes(arch.encode())
        modules[name] = KernelFile(arch, compiler, (), ("norm.cu",), ())
        files[name] = FileRecord(len(arch), hashlib.sha256(arch.encode()).hexdigest())
    options = replace(manifest.options, dtype="float32")
    edit(engine, target=TargetName("cuda", archs), kernel_files=modules, files=files, options=options)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (None, "expected an NVIDIA device and driver, found none on this machine"),
        (CudaDevice((8, 6), (13, 0), 2**34), "target.archs: expected a device of sm_90, found sm_86"),
        (CudaDevice((8, 7), (13, 0), 2**34), "--target cuda:sm_86"),
        (CudaDevice((7, 5), (13, 0), 2**34), "--target cpu"),
        (CudaDevice((9, 0), (12, 8), 2**34), "driver: expected CUDA 13.0 or newer, found CUDA 12.8"),
    ],
)
def test_foreign_gpu(
    engine: Path,
    edit_manifest: Edit,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    device: CudaDevice | None,
    message: str,
) -> None:
    with_kernels(engine, edit_manifest)
    monkeypatch.setattr(cuda, "cuda_device", lambda: device)
    assert message in refused(engine)


@pytest.mark.usefixtures("sources")
@pytest.mark.parametrize(("damage", "message"), [("missing", "found no file"), ("changed", "expected sha256")])
def test_kernel_files(
    engine: Path,
    edit_manifest: Edit,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    damage: str,
    message: str,
) -> None:
    with_kernels(engine, edit_manifest)
    monkeypatch.setattr(cuda, "cuda_device", lambda: CudaDevice((9, 0), (13, 5), 2**34))
    load_engine(engine)
    kernel = engine / "kernels" / "sm_90" / "norm.cubin"
    if damage == "missing":
        kernel.unlink()
    else:
        kernel.write_bytes(b"sm_91")
    assert f"kernels/sm_90/norm.cubin: {'expected a file' if damage == 'missing' else message}" in refused(engine)


@pytest.mark.usefixtures("sources")
def test_every_chosen_kernel_is_in_some_module(
    engine: Path, edit_manifest: Edit, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_kernels(engine, edit_manifest)
    monkeypatch.setattr(cuda, "cuda_device", lambda: CudaDevice((9, 0), (13, 5), 2**34))
    manifest = read_manifest(engine)
    path = engine / "kernels" / "sm_90" / "rope_kv.cubin"
    path.write_bytes(b"sm_90")
    record = manifest.files["kernels/sm_90/norm.cubin"]

    def modules(*entries: str) -> dict[str, KernelFile]:
        made = {}
        for source, entry in zip(("norm", "rope_kv"), entries, strict=True):
            resources = (KernelResources(entry, 32, 0, 0, 0, 0),)
            made[f"kernels/sm_90/{source}.cubin"] = KernelFile("sm_90", "NVRTC 13.0", (), (f"{source}.cu",), resources)
        return made

    files = {**manifest.files, "kernels/sm_90/rope_kv.cubin": record}
    made = (KernelChoice("a", "norm", ("n",), ("norm.cu",)), KernelChoice("b", "rope_kv", ("r",), ("rope_kv.cu",)))
    choices = (*made, *(KernelChoice(op.name, FALLBACK) for op in manifest.graph.ops))
    edit_manifest(engine, kernel_files=modules("n", "r"), files=files, kernels=choices)
    load_engine(engine)
    other = (KernelChoice("b", "rope_kv", ("r_s8",), ("rope_kv.cu",)),)
    monkeypatch.setattr(cuda.CudaTarget, "choose_kernels", lambda *_: other)  # for the KV cache of the run
    assert "kernels.b: expected kernel r_s8 for sm_90, found no such kernel" in refused(engine, kv_cache_dtype="int8")
    load_engine(engine, EngineRequest(kv_cache_dtype="float32"))  # which it was built with
    edit_manifest(engine, kernel_files=modules("n", "other"))
    assert "kernels.b: expected kernel r for sm_90, found no such kernel" in refused(engine)


def test_every_op_has_what_executes_it(engine: Path, edit_manifest: Edit, refused: Callable[..., str]) -> None:
    kernels = read_manifest(engine).kernels
    edit_manifest(engine, kernels=tuple(choice for choice in kernels if choice.op != "lm_head"))
    assert "kernels.lm_head: expected what executes it, found none" in refused(engine)


def test_the_library_that_is_opened_is_a_recorded_one(
    native: Path, tmp_path: Path, edit_manifest: Edit, refused: Callable[..., str]
) -> None:
    engine = Path(shutil.copytree(native, tmp_path / "engine"))
    (name,) = read_manifest(engine).kernel_files
    edit_manifest(engine, kernel_files={})
    assert f"kernel_files: expected {name}, found none" in refused(engine)


@pytest.mark.parametrize("field", ["weight_files", "kernel_files"])
def test_every_file_that_is_used_is_recorded(
    native: Path, tmp_path: Path, edit_manifest: Edit, refused: Callable[..., str], field: str
) -> None:
    engine = Path(shutil.copytree(native, tmp_path / "engine"))
    manifest = read_manifest(engine)
    name = next(iter(getattr(manifest, field)))
    edit_manifest(engine, files={file: record for file, record in manifest.files.items() if file != name})
    assert f"{field}.{name}: expected a recorded size and sha256, found none" in refused(engine)


def test_a_length_beyond_the_models_own_limit(built: Path) -> None:
    limit = read_manifest(built).graph.max_position
    with pytest.raises(EngineLoadError, match=f"expected at most {limit}, the model's own limit") as caught:
        load_engine(built, EngineRequest(max_model_len=limit + 1))
    assert caught.value.fix == f"--max-model-len {read_manifest(built).options.max_model_len}"


def test_an_engine_for_another_target_than_asked(built: Path, native: Path, refused: Callable[..., str]) -> None:
    arch = read_manifest(native).target.archs[0]
    for wanted in ("tpu", "cpu:sm_90", "cuda"):
        with pytest.raises(UsageError, match=r"--target.*: expected (one|some) of") as error:
            load_engine(native, EngineRequest(target=wanted))
        assert "llmctl build" not in str(error.value)
    message = refused(native, target="reference", code=ExitCode.USAGE)
    assert f"target: expected cpu:{arch}, found reference" in message
    assert "--target reference" in message
    with pytest.raises(UsageError, match=r"--target cuda:sm_90: .*NVIDIA"):  # as a rebuilt engine would be
        load_engine(native, EngineRequest(target="cuda:sm_90"))
    for wanted in (None, "cpu", f"cpu:{arch}", f"cpu:{arch.rpartition('-')[2]}"):
        assert load_engine(native, EngineRequest(target=wanted)).manifest.target.archs == (arch,)
    assert "target: expected cpu, found cpu:avx2" in refused(built, target="cpu:avx2", code=ExitCode.USAGE)


def test_missing_tensor(engine: Path, edit_manifest: Edit, refused: Callable[..., str]) -> None:
    rewrite_weights(engine, edit_manifest, lambda t: t.pop("final_norm.weight"))
    assert "tensor 'final_norm.weight': expected F32 [64], found no such tensor" in refused(engine)


def test_renamed_tensor(engine: Path, edit_manifest: Edit, refused: Callable[..., str]) -> None:
    rewrite_weights(engine, edit_manifest, lambda t: t.update({"norm.weight": t.pop("final_norm.weight")}))
    assert "tensor 'final_norm.weight': expected F32 [64], found no such tensor" in refused(engine)


def test_extra_tensor(engine: Path, edit_manifest: Edit, refused: Callable[..., str]) -> None:
    rewrite_weights(engine, edit_manifest, lambda t: t.update({"more": ("F32", (1,), np.zeros(1, np.float32))}))
    assert "tensors: expected the" in (message := refused(engine))
    assert "found 'more' as well" in message


def test_tensor_of_another_shape_or_dtype(engine: Path, edit_manifest: Edit, refused: Callable[..., str]) -> None:
    rewrite_weights(
        engine, edit_manifest, lambda t: t.update({"final_norm.weight": ("F16", (64,), np.zeros(64, np.float16))})
    )
    assert "tensor 'final_norm.weight': expected F32 [64], found F16 [64]" in refused(engine)


def test_weights_that_are_no_safetensors_file(engine: Path, refused: Callable[..., str]) -> None:
    size = (engine / WEIGHTS).stat().st_size
    (engine / WEIGHTS).write_bytes(b"\0" * size)
    assert "damaged safetensors header" in refused(engine)


def test_path_outside_the_folder(engine: Path, edit_manifest: Edit, refused: Callable[..., str]) -> None:
    edit_manifest(engine, files={"../outside": FileRecord(0, "")})
    assert "expected a path inside the engine folder" in refused(engine)


def test_requested_limits(engine: Path, refused: Callable[..., str]) -> None:
    message = refused(engine, max_model_len=512, code=ExitCode.USAGE)
    assert "max_model_len: expected at most 256, found 512" in message
    assert "--max-model-len 512" in message
    assert "block_size: expected 16, found 32" in refused(engine, block_size=32, code=ExitCode.USAGE)
    assert "dtype: expected float32, found bfloat16" in refused(engine, dtype="bfloat16", code=ExitCode.USAGE)
    assert load_engine(engine, EngineRequest(max_model_len=100)).sizes.max_model_len == 100


def test_memory_that_is_not_there(engine: Path) -> None:
    plan = load_engine(engine).plan
    budget = plan.weights + plan.activations + 10 * plan.block_size * plan.kv_per_token
    with pytest.raises(EngineLoadError) as caught:
        load_engine(engine, EngineRequest(budget=budget))
    for part in ("weights", "activations", "KV", "256 tokens", "use --max-model-len 160 or less"):
        assert part in str(caught.value)
    assert caught.value.exit_code == ExitCode.RUNTIME
    assert load_engine(engine, EngineRequest(budget=budget, max_model_len=160)).plan.num_blocks == 10
    with pytest.raises(EngineLoadError, match="the weights and activations alone do not fit"):
        load_engine(engine, EngineRequest(budget=1000))


def test_checks_come_in_the_stated_order(engine: Path, edit_manifest: Edit, refused: Callable[..., str]) -> None:
    """With everything wrong at once, mending one thing after another shows the next check's line."""
    rewrite_weights(engine, edit_manifest, lambda t: t.pop("final_norm.weight"))
    weights = (engine / WEIGHTS).read_bytes()
    edit_manifest(engine, target=TargetName("cpu", ("made_up",)))
    good = (engine / MANIFEST_NAME).read_text()
    (engine / WEIGHTS).write_bytes(weights[:-1])
    (engine / MANIFEST_NAME).write_text(good.replace('"format_version": 7', '"format_version": 0'))
    arguments = {"max_model_len": 400, "budget": 1}
    assert "format_version" in refused(engine, **arguments)
    (engine / MANIFEST_NAME).write_text(good)
    assert f"{WEIGHTS}: expected" in refused(engine, **arguments)
    (engine / WEIGHTS).write_bytes(weights)
    assert "target: expected a CPU that runs made_up" in refused(engine, **arguments)
    edit_manifest(engine, target=TargetName("cpu"))
    assert "tensor 'final_norm.weight'" in refused(engine, **arguments)
    rewrite_weights(
        engine, edit_manifest, lambda t: t.update({"final_norm.weight": ("F32", (64,), np.ones(64, np.float32))})
    )
    assert "max_model_len" in refused(engine, code=ExitCode.USAGE, **arguments)
    with pytest.raises(LlmctlError, match="memory: expected at most 1 B"):
        load_engine(engine, EngineRequest(budget=1))


@pytest.mark.parametrize(
    ("size", "said"),
    [(1024, r"--kv-cache-memory: expected at least .* for one sequence of 256 tokens, found 1.0 KiB"),
     (10**13, r"--kv-cache-memory: expected at most .* that are free, found 9313.2 GiB")],
)  # fmt: skip
def test_a_cache_size_that_cannot_be(engine: Path, size: int, said: str) -> None:
    with pytest.raises(EngineLoadError, match=said):
        load_engine(engine, EngineRequest(kv_cache_bytes=size))
