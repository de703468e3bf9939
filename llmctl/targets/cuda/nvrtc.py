"""Binding to NVRTC, NVIDIA's runtime compiler, as a plain shared library: needs no toolkit, driver or device.

Bound with ctypes rather than through cupy: the library alone loads in about 50 ms where ``import cupy`` takes 700 ms,
and only the ``nvidia-cuda-nvrtc`` wheel has to be installed to cross-build.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import CompileError
from llmctl.extras import install_command


@dataclass(frozen=True)
class NvrtcResult:
    """One compilation: ``code`` is the cubin or PTX, empty when ``ok`` is false; ``log`` is the compiler's."""

    ok: bool
    code: bytes
    log: str


class Nvrtc:
    """The loaded library. Thread-safe: ctypes releases the GIL, and programs are independent."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"{major.value}.{minor.value}"

    def supported_archs(self) -> tuple[str, ...]:
        """Architectures this NVRTC can compile for, e.g. ``("sm_75", "sm_80", …)``."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
        archs = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(archs))
        return tuple(f"sm_{arch}" for arch in archs)

    def compile(self, source: str, name: str, headers: Mapping[str, str], options: Sequence[str]) -> NvrtcResult:
        """Compile one translation unit; ``headers`` are the files it may ``#include``, by name.

        The result is a cubin for ``--gpu-architecture=sm_XX`` and PTX for ``compute_XX``.
        """
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(headers))(*(n.encode() for n in headers))
        texts = (ctypes.c_char_p * len(headers))(*(t.encode() for t in headers.values()))
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
            )
        )
        try:
            flags = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
            status = self._library.nvrtcCompileProgram(program, len(options), flags)
            log = self._blob(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status != 0:
                return NvrtcResult(False, b"", log or self._message(status))
            kind = "PTX" if any(o.startswith("--gpu-architecture=compute_") for o in options) else "CUBIN"
            return NvrtcResult(True, self._blob(program, kind), log)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _blob(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(max(size.value, 1))
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw[: size.value]

    def _message(self, status: int) -> str:
        return (self._library.nvrtcGetErrorString(status) or b"unknown error").decode()

    def _check(self, status: int) -> None:
        if status != 0:
            raise CompileError(f"NVRTC: {self._message(status)}", fix=install_command("cuda"))


@functools.cache
def load_nvrtc() -> Nvrtc:
    """The NVRTC of the installed ``nvidia-cuda-nvrtc`` wheel, else the system's.

    Raises:
        CompileError: no NVRTC is installed.
    """
    for candidate in _candidates():
        try:
            if Path(candidate).is_absolute():
                # NVRTC opens its builtins by name, and 13.0's wheel does not look for them beside itself.
                for builtins in Path(candidate).parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
            return Nvrtc(ctypes.CDLL(candidate))
        except (OSError, AttributeError):
            continue
    raise CompileError("no CUDA compiler: NVRTC is not installed", fix=install_command("cuda"))


def _candidates() -> Iterator[str]:
    yield from _wheel_libraries()
    # Asked last: it runs ldconfig and the C compiler.
    system = ctypes.util.find_library("nvrtc")
    if system is not None:
        yield system


def _wheel_libraries() -> list[str]:
    """``libnvrtc`` files of pip wheels (``nvidia/cu13/lib``, ``nvidia/cuda_nvrtc/lib``): folders as Python's path has
    them, in each the newest version first."""
    spec = importlib.util.find_spec("nvidia")
    found: list[str] = []
    for root in (spec.submodule_search_locations if spec else None) or ():
        versions = {p: p.name.removeprefix("libnvrtc.so.") for p in Path(root).glob("*/lib/libnvrtc.so.*")}
        libraries = [path for path, version in versions.items() if version.isdigit()]
        found += [str(path) for path in sorted(libraries, key=lambda p: int(versions[p]), reverse=True)]
    return found
