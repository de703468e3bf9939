"""The CPU kernels under sanitizers: ``make sanitize``; CI runs it. Exit code 0 when all is clean, 1 otherwise.

AddressSanitizer and UndefinedBehaviorSanitizer: every build of the kernels that the tests run, through the kernel
tests and a part of the runtime's, with poisoned gaps between the activations (arena_redzones.py in SOURCES). Tile
registers in software are among them: of those the sanitizers see every load and store.
ThreadSanitizer: the pool and whole steps (pool_stress.cpp, step_stress.cpp). Then faults are planted, each of which the
same set-up must report: a sanitizer that is not really on would pass everything.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llmctl.errors import CompileError
from llmctl.targets.cpu.features import cpu_features
from llmctl.targets.cpu.toolchain import (
    INSTALL_HINT,
    SOURCE_DIR,
    amx_to_test,
    compile_library,
    find_compiler,
    supported_variants,
    variants_to_test,
)

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "targets" / "cpu" / "sanitize"
# Calls in place of checks in line, and without two that AddressSanitizer's make idle: compiled in 0.4 of the time.
ADDRESS = (
    "-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize=null,object-size",
    "-fno-sanitize-recover=all", "--param=asan-instrumentation-with-call-threshold=0",
)  # fmt: skip
THREAD = ("-std=c++17", "-O1", "-g1", "-pthread", "-Wall", "-Wextra", "-Wno-psabi", "-fsanitize=thread")
KERNEL_TESTS = ("attention", "lora", "linear", "nested", "fields", "amx", "row_ops", "sampler")  # longest first
RUNTIME_TESTS = "any_batch_and_chunking or long_contexts or penalties_bias or act_order or threads_does_not"
PROBE_TEST = "tests/targets/cpu/test_cpu_linear.py::test_zero_rows_and_zero_scales"
FAULTS = {
    "heap": "AddressSanitizer: heap-buffer-overflow",
    "arena": "AddressSanitizer: use-after-poison",
    "undefined": "signed integer overflow",
}


class Failure(Exception):
    """A check that did not come out as it should; the message is for the user."""


@dataclass(frozen=True)
class Toolbox:
    """The compiler, the runtimes to preload, a scratch folder."""

    compiler: tuple[str, ...]
    preload: tuple[Path, ...]
    folder: Path


def find_toolbox(folder: Path) -> Toolbox:
    """The compiler with its sanitizer runtimes.

    Raises:
        Failure: no compiler, or one without a shared AddressSanitizer runtime.
    """
    compiler = find_compiler()
    if compiler is None:
        raise Failure(f"no C++ compiler found: {INSTALL_HINT}")
    # Without libstdc++ beside it, libasan finds no __cxa_throw to wrap in a Python process.
    preload = tuple(_runtime(compiler, name) for name in ("libasan.so", "libstdc++.so"))
    return Toolbox(compiler, preload, folder)


def _runtime(compiler: tuple[str, ...], name: str) -> Path:
    found = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
    path = Path(found.stdout.strip())
    if not path.is_absolute() or not path.exists():
        raise Failure(f"{shlex.join(compiler)} has no shared {name}: use GCC (CXX=g++; apt install g++)")
    return path.resolve()


def address_compiler(tools: Toolbox) -> Path:
    """A compiler for $CXX that adds ADDRESS, and to the kernels the faults, which sleep until one is asked for."""
    path, source = tools.folder / "cxx-address", SOURCES / "planted.cpp"
    flags = (*ADDRESS, f"-I{SOURCE_DIR}")
    path.write_text(
        "#!/bin/sh\nfor a; do\n  shift\n"
        f'  [ "$a" = program.cpp ] && a={shlex.quote(str(source))}\n'
        '  set -- "$@" "$a"\ndone\n'
        f'exec {shlex.join(tools.compiler)} "$@" {shlex.join(flags)}\n'
    )
    path.chmod(0o755)
    return path


def python_environment(tools: Toolbox, fault: str = "") -> dict[str, str]:
    """Variables of a Python process that loads sanitized kernels; ``fault``: which of the planted ones wakes."""
    return {
        **os.environ,
        "CXX": str(address_compiler(tools)),
        "LLMCTL_CACHE": str(tools.folder / "address"),
        "LLMCTL_FAULT": fault,
        "LD_PRELOAD": ":".join(map(str, tools.preload)),
        # Small arrays of Python are then allocations of their own, with poisoned ends.
        "PYTHONMALLOC": "malloc",
        # Python itself leaks by design.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SOURCES), os.environ.get("PYTHONPATH")))),
    }


def compile_variants(tools: Toolbox) -> tuple[str, ...]:
    """Compile every variant the kernel tests run into the kernel cache, two at a time; their names."""
    variants = dict.fromkeys((*amx_to_test(cpu_features()), *variants_to_test(cpu_features())))
    os.environ["CXX"] = str(address_compiler(tools))
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda v: compile_library(v, cache=tools.folder / "address" / "kernels"), variants))
    except CompileError as error:
        raise Failure(str(error)) from error
    finally:
        del os.environ["CXX"]
    return tuple(v.name for v in variants)


def run_pytest(environment: Mapping[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in this repository, its output captured."""
    entry = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    # -s: a sanitizer's report must not die in pytest's capture with the process.
    command = [sys.executable, "-P", "-c", entry, "-x", "-s", "-p", "no:faulthandler", "-p", "arena_redzones"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=dict(environment), capture_output=True, text=True, check=False
    )


def check_address(tools: Toolbox) -> str:
    """Kernel tests on every variant, and part of the runtime's tests, under ASan and UBSan."""
    names = compile_variants(tools)
    environment = python_environment(tools)
    # Slow: the variants that the default suite leaves out. What forks or execs is not for a preloaded sanitizer.
    choice = ("-m", "", "-k", "not granted and not refusal and not forks")
    runs = [(f"tests/targets/cpu/test_cpu_{name}.py", *choice) for name in KERNEL_TESTS]
    runs.append(("tests/targets/cpu/test_cpu.py", "-k", RUNTIME_TESTS))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda arguments: run_pytest(environment, *arguments), runs))
    passed = []
    for arguments, result in zip(runs, results, strict=True):
        if result.returncode:
            raise Failure(f"pytest {shlex.join(arguments)} exited with {result.returncode}\n{tail(result)}")
        passed.append(f"{Path(arguments[0]).stem}: {result.stdout.strip().splitlines()[-1]}")
    return f"{', '.join(names)}; {'; '.join(passed)}"


def check_faults(tools: Toolbox) -> str:
    """Every planted fault ends the tests with the sanitizer's report."""
    sound = run_pytest(python_environment(tools), PROBE_TEST, "-k", "portable")
    if sound.returncode:
        raise Failure(f"without a fault, {PROBE_TEST} exited with {sound.returncode}\n{tail(sound)}")
    for fault, report in FAULTS.items():
        result = run_pytest(python_environment(tools, fault), PROBE_TEST, "-k", "portable")
        if result.returncode == 0 or report not in result.stdout + result.stderr:
            raise Failure(f"planted fault '{fault}': expected '{report}', found none\n{tail(result)}")
    return f"{len(FAULTS)} faults reported"


def check_threads(tools: Toolbox) -> str:
    """The pool and whole steps under ThreadSanitizer, and a planted race."""
    flags = supported_variants(cpu_features())[0].flags
    runs = (("pool_stress", (), 0), ("step_stress", flags, 0), ("pool_stress", ("-DPLANTED_RACE",), 66))
    for number, (name, extra, expected) in enumerate(runs):
        program = tools.folder / f"{name}{number}"
        source = str(SOURCES / f"{name}.cpp")
        command = [*tools.compiler, *THREAD, *extra, f"-I{SOURCE_DIR}", source, "-o", str(program)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            raise Failure(f"{source} does not compile\n{tail(made)}")
        result = run_threads(program)
        if result.returncode != expected:
            raise Failure(f"{program.name}: expected exit code {expected}, found {result.returncode}\n{tail(result)}")
    return "pool and steps clean, planted race reported"


def run_threads(program: Path) -> subprocess.CompletedProcess[str]:
    """Run a TSan binary; once more without address randomisation where its layout does not fit the runtime."""
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    if "unexpected memory mapping" in result.stderr and shutil.which("setarch"):
        result = subprocess.run(["setarch", "-R", str(program)], capture_output=True, text=True, check=False)
    return result


def tail(result: subprocess.CompletedProcess[str], lines: int = 60) -> str:
    """The end of a process's output."""
    return "\n".join((result.stdout + result.stderr).splitlines()[-lines:])


CHECKS: dict[str, Callable[[Toolbox], str]] = {
    "address": check_address,
    "faults": check_faults,
    "threads": check_threads,
}


def main() -> int:
    """Run the checks asked for, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", choices=[[], *CHECKS], help="default: all")
    chosen = parser.parse_args().checks or list(CHECKS)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            tools = find_toolbox(Path(scratch))
            for name in chosen:
                began = time.monotonic()
                print(f"{name}: {CHECKS[name](tools)} ({time.monotonic() - began:.0f} s)", flush=True)
        except Failure as error:
            print(f"sanitize: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
