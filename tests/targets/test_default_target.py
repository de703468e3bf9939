"""What a model is built for when nobody says: the GPU where it can be used, the CPU otherwise, and why in one line."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass

import pytest

from llmctl.errors import UsageError
from llmctl.extras import install_command
from llmctl.targets.cuda import launch, readiness
from llmctl.targets.cuda import target as cuda
from llmctl.targets.cuda.device import CudaDevice
from llmctl.targets.cuda.readiness import missing_here
from llmctl.targets.table import BEST_FIRST, ROOMS, default_target, parse_target

H100 = CudaDevice((9, 0), (13, 0), 80 * 2**30)


@dataclass
class Torch:
    """As much of torch as is asked."""

    cuda_version: str | None
    available: bool

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module = types.ModuleType("torch")
        module.__version__ = "9.9"  # type: ignore[attr-defined]
        module.version = types.SimpleNamespace(cuda=self.cuda_version)  # type: ignore[attr-defined]
        module.cuda = types.SimpleNamespace(is_available=lambda: self.available)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch", module)


def on_machine(monkeypatch: pytest.MonkeyPatch, device: CudaDevice | None, missing: str | None = None) -> None:
    monkeypatch.setattr(readiness, "cuda_device", lambda: device)
    monkeypatch.setattr(cuda, "cuda_device", lambda: device)
    for name in ("missing_launcher", "missing_device"):
        monkeypatch.setattr(launch, name, lambda: missing)
    Torch("13.0", True).install(monkeypatch)


def test_without_a_gpu_it_is_the_cpu_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "torch", None)  # and torch is not imported to find out
    assert (default_target().spelling, default_target().said) == ("cpu", ())


def test_a_gpu_that_can_be_used_is(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, H100)
    found = default_target()
    assert found.spelling == "cuda"
    assert found.said == ("using the GPU (sm_90, 80.0 GiB); --target cpu would use the CPU",)
    assert str(parse_target(found.spelling).name) == "cuda:sm_90"


@pytest.mark.parametrize(
    ("device", "torch", "missing", "said"),
    [
        (H100, Torch("13.0", True), "cupy is not installed", "the GPU (sm_90, 80.0 GiB) is not used: cupy is not"),
        (H100, Torch(None, False), None, "this torch (9.9) is built without CUDA"),
        (H100, Torch("13.4", False), None, "torch is built for CUDA 13.4 and cannot use the device; the driver is for "
         "CUDA 13.0"),
        (CudaDevice((7, 5), (13, 0), 2**34), Torch("13.0", True), None, "expected a GPU of sm_80, sm_86, sm_89, sm_90"),
    ],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used_is_said_loudly(
    monkeypatch: pytest.MonkeyPatch, device: CudaDevice, torch: Torch, missing: str | None, said: str
) -> None:
    on_machine(monkeypatch, device, missing)
    torch.install(monkeypatch)
    found = default_target()
    assert found.spelling == "cpu"
    (line,) = found.said
    assert line.startswith("warning: the GPU (sm_")
    assert said in line
    assert line.endswith("; building for the target cpu instead")


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert missing_here(H100) == f"torch is not installed: {install_command('cuda')}"


def test_every_room_that_offers_itself_is_asked() -> None:
    assert set(BEST_FIRST) == {name for name, room in ROOMS.items() if room.offer is not None}
    assert BEST_FIRST[-1] == "cpu"


@pytest.mark.parametrize(
    ("capability", "arch"), [((9, 0), "sm_90"), ((8, 7), "sm_86"), ((10, 3), "sm_100"), ((12, 1), "sm_120")]
)
def test_cuda_alone_is_this_machines_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str
) -> None:
    on_machine(monkeypatch, CudaDevice(capability, (13, 0), 2**34))
    target = parse_target("cuda")
    assert target.name.archs == (arch,)
    target.check_runs_here()


def test_cuda_alone_without_a_gpu_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    on_machine(monkeypatch, None)
    with pytest.raises(UsageError, match=r"or a GPU whose architecture to take, found neither: .*") as caught:
        parse_target("cuda")
    assert caught.value.fix == "--target cpu; or, to build for another machine, --target cuda:sm_80"
    on_machine(monkeypatch, CudaDevice((7, 5), (13, 0), 2**34))
    with pytest.raises(UsageError, match=r"--target cuda: expected a GPU of sm_80, .*, found sm_75") as caught:
        parse_target("cuda")
    assert caught.value.fix == "--target cpu"


@pytest.mark.parametrize(
    ("target", "device", "missing", "said"),
    [
        ("cuda:sm_90", None, None, "NVIDIA"),
        ("cuda:sm_90", CudaDevice((8, 6), (13, 0), 2**34), None, None),  # by its PTX
        ("cuda:sm_90", CudaDevice((7, 5), (13, 0), 2**34), None, "expected a GPU of sm_90, found sm_75"),
        ("cuda:sm_90", H100, "cupy is not installed", "cupy is not installed"),
        ("cuda:sm_80,sm_90", H100, None, None),
    ],
)
def test_what_a_machine_must_have(
    monkeypatch: pytest.MonkeyPatch, target: str, device: CudaDevice | None, missing: str | None, said: str | None
) -> None:
    on_machine(monkeypatch, device, missing)
    if said is None:
        parse_target(target).check_runs_here()
        return
    with pytest.raises(UsageError, match=said) as caught:
        parse_target(target).check_runs_here()
    assert caught.value.fix == "--target cpu"
