"""``--backend``: the native algorithms, or an external package behind the same options.

External packages follow particular versions of torch and transformers, so each is probed before anything else happens
and refused in one line with the cause and the fix.
"""

from __future__ import annotations

import importlib
import os
import shutil
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from llmctl.checkpoint.assemble import checkpoint_graph
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.reader import Checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.config import QuantizeConfig
from llmctl.errors import LlmctlError, UsageError
from llmctl.extras import MODULES, install_command, missing
from llmctl.quantize.calibration import Calibration
from llmctl.quantize.driver import Progress, Silent, calibrate, quantize_checkpoint
from llmctl.quantize.methods import scheme_of
from llmctl.quantize.plan import check_options, make_plan
from llmctl.quantize.report import QuantizeReport, make_report
from llmctl.quantize.workfolder import check_output

BACKENDS = ("native", "autoawq", "auto-gptq", "gptqmodel")

_NATIVE = "use --backend native, which needs no package"


def run_backend(config: QuantizeConfig, progress: Progress = Silent()) -> QuantizeReport:
    """Quantize with ``config.backend``.

    Raises:
        UsageError: an unknown backend, one that is not installed or cannot work here, or options it does not have;
            and all that ``quantize_checkpoint`` raises.
    """
    if config.backend == "native":
        return quantize_checkpoint(config, progress)
    if config.backend not in BACKENDS:
        raise UsageError(f"--backend {config.backend}: expected one of {', '.join(BACKENDS)}", param="backend")
    module = probe(config.backend)
    if config.backend != "autoawq":
        # Neither can be run where llmctl is tested: auto-gptq needs CUDA and transformers 4, gptqmodel torch >= 2.14.1.
        raise UsageError(
            f"--backend {config.backend}: the package is installed, but this version of llmctl does not drive it",
            fix=f"{_NATIVE}, with --method gptq: it writes the same format",
            param="backend",
        )
    return _run_autoawq(module, config, progress)


def probe(backend: str) -> Any:
    """Import an external backend's package.

    Raises:
        UsageError: it is not installed, or its import fails here; with the cause and the fix.
    """
    (name,) = MODULES[backend]
    if missing(backend):
        raise UsageError(
            f"--backend {backend}: the package is not installed",
            fix=f"{install_command(backend, '--no-build-isolation')}, or {_NATIVE}",
            param="backend",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except Exception as error:  # these packages fail on import in many ways: missing symbols, wrong versions, no CUDA
        raise UsageError(
            f"--backend {backend}: its package cannot be imported here: {_reason(error)}",
            fix=f"install the versions it was made for, or {_NATIVE}",
            param="backend",
        ) from error


def _reason(error: Exception) -> str:
    """An exception as one line; where it was raised, if it says nothing itself (a bare assert)."""
    said = " ".join(str(error).split())[:200]
    if not said:
        last = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{Path(last.filename).name}:{last.lineno}: {last.line}"
    return f"{type(error).__name__}: {said}"


def _run_autoawq(module: Any, config: QuantizeConfig, progress: Progress) -> QuantizeReport:
    """AutoAWQ on the same calibration tokens; the folder appears whole, by a rename."""
    started = time.monotonic()
    check_options(config)
    _check_autoawq(config)
    output = Path(config.output)
    check_output(output, resume=False)
    checkpoint = open_checkpoint(resolve_model(config.model), as_family=config.as_family)
    if not checkpoint.path.is_dir():
        raise UsageError(
            f"--backend autoawq: reads Hugging Face folders only, found {checkpoint.path.name}", fix=_NATIVE
        )
    graph = checkpoint_graph(checkpoint)
    plan = make_plan(config, checkpoint, graph)
    calibration = calibrate(config, checkpoint, graph, progress)
    progress.note(f"calibration: {calibration.note}")
    folder = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    try:
        _call_autoawq(module, config, checkpoint, calibration, plan.output.ignored, folder)
        os.rename(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return make_report(plan, graph, checkpoint, calibration.note, [], time.monotonic() - started)


def _check_autoawq(config: QuantizeConfig) -> None:
    scheme = scheme_of(config)
    wanted = {"method": "awq", "bits": 4, "symmetric": False, "resume": False}
    found = {"method": config.method, "bits": scheme.bits, "symmetric": scheme.symmetric, "resume": config.resume}
    for name, value in wanted.items():
        if found[name] != value:
            said = str(found[name]).lower()
            raise UsageError(
                f"--backend autoawq: has {name.replace('_', '-')} {str(value).lower()} only, found {said}",
                fix=_NATIVE,
                param=name,
            )
    if config.rotate:
        raise UsageError("--backend autoawq: has no --rotate", fix=_NATIVE, param="rotate")
    if config.device != "cpu":
        raise UsageError("--backend autoawq: has no --device", fix=_NATIVE, param="device")
    if config.merge_adapter:
        raise UsageError("--backend autoawq: has no --merge-adapter", fix=_NATIVE, param="merge_adapter")
    if config.override or config.has_budget:
        raise UsageError("--backend autoawq: has no --override and no --target-bpw or -size", fix=_NATIVE)
    if config.format not in ("auto", "awq"):
        raise UsageError(f"--backend autoawq: writes its own format only, found --format {config.format}", fix=_NATIVE)


def _call_autoawq(
    module: Any,
    config: QuantizeConfig,
    checkpoint: Checkpoint,
    calibration: Calibration,
    ignored: tuple[str, ...],
    folder: Path,
) -> None:
    settings = {"zero_point": True, "q_group_size": scheme_of(config).group_size, "w_bit": 4, "version": "GEMM"}
    if ignored != ("lm_head",):
        settings["modules_to_not_convert"] = list(ignored)
    samples, length = calibration.tokens.shape
    try:
        model = module.AutoAWQForCausalLM.from_pretrained(str(checkpoint.path), device_map="cpu", use_cache=False)
        from transformers import AutoTokenizer

        model.quantize(
            AutoTokenizer.from_pretrained(str(checkpoint.path)),
            quant_config=settings,
            calib_data=calibration.tokens.tolist(),
            max_calib_samples=samples,
            max_calib_seq_len=length,
        )
        model.save_quantized(str(folder))
    except Exception as error:  # an unmaintained package on versions it never saw
        raise LlmctlError(f"--backend autoawq failed: {_reason(error)}", fix=_NATIVE) from error
    for name, content in checkpoint.aux_files().items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
