"""A cpu target on a machine that had no C++ compiler: its engines have no native kernels and run on torch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmctl.engine.step import Runtime
from llmctl.errors import UsageError
from llmctl.graph.dtypes import DTYPES
from llmctl.targets.base import BuildOptions, CompileProgress, KernelChoice, Module, RuntimeEngine
from llmctl.targets.cpu.options import cpu_passes
from llmctl.targets.cpu.packing import LM_HEAD_BITS
from llmctl.targets.cpu.toolchain import INSTALL_HINT
from llmctl.targets.reference.target import ReferenceTarget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class UncompiledCpu(ReferenceTarget):
    """Loudly the reference target; weights lie in the compute dtype."""

    def graph_passes(self, names: tuple[str, ...] | None, activations: str) -> tuple[str, ...]:
        """As for the native kernels, so that the same options build on every machine."""
        return cpu_passes(names, activations)

    def compile(
        self,
        choices: Sequence[KernelChoice],
        cache: Path,
        progress: CompileProgress | None = None,
    ) -> list[Module]:
        """Nothing, and says so on stderr."""
        print(
            f"warning: no C++ compiler found: the engine will run on torch, many times slower; {INSTALL_HINT}",
            file=sys.stderr,
        )
        return []

    def open_runtime(self, engine: RuntimeEngine, threads: int | None = None) -> Runtime:
        """A ReferenceRuntime, with a warning."""
        logger.warning("this engine was built without a C++ compiler: it runs on torch, many times slower")
        return super().open_runtime(engine, threads)

    def _dense(self, options: BuildOptions) -> tuple[str, ...]:
        return (DTYPES[options.dtype].safetensors,)

    def _kv_cache_dtype(self, name: str, dtype: str) -> str:
        if name == "int8":
            raise _no_compiler("kv_cache_dtype", name)
        return super()._kv_cache_dtype(name, dtype)

    def _lm_head(self, name: str) -> str:
        if name in LM_HEAD_BITS:
            raise _no_compiler("lm_head", name)
        return super()._lm_head(name)


def _no_compiler(param: str, value: str) -> UsageError:
    """The refusal of an option that only the native kernels honour, on a machine that cannot compile them."""
    return UsageError(
        f"--{param.replace('_', '-')} {value}: expected a C++ compiler for the kernels of a cpu target, found none",
        fix=INSTALL_HINT,
        param=param,
    )
