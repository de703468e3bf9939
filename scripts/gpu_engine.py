"""``scripts/gpu_check.sh --engine``: whole models on the CUDA runtime, right and fast, in under 5 minutes.

Parts, the most telling first: ``right`` (small models against the reference), ``rates`` (of the device), ``decode``,
``served`` (in process) and ``prefill`` of Llama-3-8B's shape in 4 bits and bf16, ``http`` (``llmctl serve`` on a
written engine folder), ``gaps`` (idle time, from traces), ``trial`` (another program, for comparison), then Qwen3-4B's
shape. Everything is bounded in time, and what was found is written after every piece: gpu_engine.json, gpu_engine.md
and charts. Exit codes: 0 done, 1 something was wrong, 3 no usable GPU here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_check.supervise import Report, Task, supervise, work

NO_GPU = 3
PARTS = ("right", "rates", "decode", "served", "prefill", "http", "gaps", "trial")
_W4, _BF16 = "Llama-3-8B 4-bit", "Llama-3-8B bf16"
TASKS = (
    Task("facts", 20, 0, "models"), Task("right first", 60, 8, "models"), Task("rates", 15, 5, "models"),
    Task(f"decode {_W4}", 30, 8, "models"), Task(f"served {_W4}", 30, 8, "models"),
    Task(f"prefill {_W4}", 12, 4, "models"), Task(f"decode {_BF16}", 25, 10, "models"),
    Task(f"served {_BF16}", 30, 8, "models"), Task(f"prefill {_BF16}", 12, 4, "models"),
    Task(f"http {_W4}", 75, 25, "http"), Task(f"gaps {_W4}", 30, 14, "traces"), Task("trial", 90, 35, "trial"),
    Task("decode Qwen3-4B 4-bit", 20, 10, "more"), Task("prefill Qwen3-4B 4-bit", 8, 4, "more"),
    Task("decode Qwen3-4B bf16", 20, 10, "more"), Task("right rest", 60, 8, "more"),
)  # fmt: skip
"""Seconds on an H100: the most a task may take, and with how many it is not worth beginning."""


def chosen(parts: Sequence[str], trial: str, http: bool) -> list[Task]:
    """The tasks of some parts. ``trial``: the command, "" for none."""
    found = [task for task in TASKS if task.name == "facts" or task.name.split()[0] in parts]
    left = {"trial"} if not trial else set()
    left |= set() if http else {"http"}
    return [task for task in found if task.name.split()[0] not in left]


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    options = _parser().parse_args(argv)
    parts = [part for part in options.parts.split(",") if part]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        print(f"gpu_check --engine: --parts: unknown '{unknown[0]}': some of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if options.events is not None:
        _work(options)
        return 0
    if not options.dry:
        reason = _missing()
        if reason is not None:
            print(f"gpu_check --engine: no usable GPU: {reason}", file=sys.stderr)
            return NO_GPU
    return _run(options, parts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh --engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("."), metavar="FOLDER", help="for what is written (default: here)")
    add("--seconds", type=float, default=285.0, help="time for everything (default: %(default)g)")
    add("--parts", default=",".join(PARTS), metavar="NAMES", help="comma-separated (default: %(default)s)")
    add(
        "--trial",
        default=os.environ.get("GPU_TRIAL", ""),
        metavar="COMMAND",
        help="writes trial.json into the folder that OUT names, see engine_check/trial.py (default: $GPU_TRIAL)",
    )
    add("--work", type=Path, metavar="FOLDER", help="for engine folders, some 6 GB (default: a temporary one)")
    add("--dry", action="store_true", help="on the CPU, by the reference: checks the script, measures nothing")
    add("--events", type=int, help=argparse.SUPPRESS)
    return parser  # fmt: skip


def _missing() -> str | None:
    """Why there is no usable GPU, asked in a process of its own: this one takes none of the device's memory."""
    code = "from llmctl.targets.cuda.launch import missing_device; print(missing_device() or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return done.stdout.strip() or None


def _run(options: argparse.Namespace, parts: Sequence[str]) -> int:
    from engine_check import report as files

    began = time.monotonic()
    report = Report()
    facts = _facts(options)
    with _work_folder(options) as folder:
        command = [
            sys.executable, str(Path(__file__).resolve()), "--output", str(options.output.resolve()), "--work",
            str(folder), "--trial", options.trial, *(["--dry"] if options.dry else []),
        ]  # fmt: skip
        tasks = chosen(parts, options.trial, http=not options.dry)
        with _writing(tasks, folder):
            supervise(
                tasks, command, options.seconds - (time.monotonic() - began), report,
                lambda grown: files.write(options.output, facts, grown),
            )  # fmt: skip
    facts["seconds"] = round(time.monotonic() - began)
    files.write(options.output, facts, report)
    document = files.as_document(facts, report)
    for line in files.failed(document):
        print(f"FAILED {line}")
    for row in files.goal_rows(document):
        print(" | ".join(row))
    print(f"{options.output / 'gpu_engine.md'}, {facts['seconds']} s")
    return 1 if files.failed(document) else 0


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    from llmctl import __version__
    from llmctl.bench.environment import git_commit

    commit = os.environ.get("LLMCTL_COMMIT") or git_commit()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "commit": commit or "unknown",
        "llmctl": __version__, "python": platform.python_version(), "measured": not options.dry,
    }  # fmt: skip


@contextlib.contextmanager
def _work_folder(options: argparse.Namespace) -> Iterator[Path]:
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        yield options.work.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="llmctl-gpu-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def _writing(tasks: Sequence[Task], folder: Path) -> Iterator[None]:
    """Engine folders are written while other parts run, by a process that asks for no GPU."""
    from engine_check import http_serve
    from engine_check.models import model

    names = [task.name.removeprefix("http ") for task in tasks if task.name.startswith("http ")]
    writers = []
    if not http_serve.missing_packages():
        for name in names:
            shape, _, kind = name.rpartition(" ")
            target = engine_folder(folder, name)
            shutil.rmtree(target, ignore_errors=True)
            http_serve.written_mark(target).unlink(missing_ok=True)
            writers.append(http_serve.start_writing(model(shape, kind, _arch()), target))
    try:
        yield
    finally:
        for writer in writers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(writer.pid, signal.SIGKILL)
            writer.wait()


def engine_folder(work_folder: Path, name: str) -> Path:
    """Where the engine of a model lies."""
    return work_folder / name.replace(" ", "-")


def _arch() -> str:
    from llmctl.targets.cuda.device import cuda_device

    device = cuda_device()
    return device.arch if device is not None else "sm_90"


def _work(options: argparse.Namespace) -> None:
    """A worker: orders come on standard input, events go to the descriptor."""
    from engine_check.session import Session

    session = Session(setting_of(options))
    with os.fdopen(options.events, "w") as events:
        work(session.run, sys.stdin, events, session.lost)


def setting_of(options: argparse.Namespace) -> Any:
    """What the worker's tasks run on: this machine's GPU, or small stand-ins for a dry run."""
    from engine_check import place
    from engine_check.session import Setting

    setting = Setting(
        place.CudaPlace, _arch, options.output, lambda name: engine_folder(options.work, name), options.trial
    )
    if not options.dry:
        return setting
    from engine_check.dry import DryRuntime
    from engine_check.loads import Load
    from engine_check.models import SHAPES, Model
    from engine_check.right import VARIANTS

    small: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 1024,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
    }  # fmt: skip
    return replace(
        setting, place=lambda: place.HostPlace(DryRuntime),
        models=lambda shape, kind, arch: Model(shape, kind, {**SHAPES[shape], **small}, arch),
        variants=VARIANTS[:2], decodes=((1, 64), (4, 64)), prefills=(64, 32), one=Load(1, 16, 8, 2),
        many=Load(4, 24, 8, 1), rates=lambda: {},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
