#!/usr/bin/env python3
"""llmctl's server against llama.cpp's, vLLM's on a CPU and OpenVINO GenAI: same model, machine and load, in one run.

    python scripts/bench_peers.py --work ~/peers                      # install, measure, print the table
    python scripts/bench_peers.py --work ~/peers --install-only       # the long part, once (compiles llama.cpp)
    python scripts/bench_peers.py --work ~/peers --peers llama-q4_0 --workloads single --repeats 5

One server runs at a time, pinned to --cores with one thread on each; in every repeat each server is started, warmed up,
given every workload by `llmctl bench serve` (a fresh connection for each request) and stopped. The order changes with
each repeat. Ratios are taken within a repeat. Stdout holds the Markdown report; progress goes to stderr.

Exit codes: 0 all measured; 1 something that was asked for could not be; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from peers import llama_cpp, ov_genai, own, vllm_cpu
from peers.checkpoints import dense_checkpoint
from peers.contest import Contestant, Cpu, PeerError, Setup
from peers.measure import WORKLOADS, Plan, Visit, visits
from peers.origin import claim
from peers.report import Results, to_json, to_markdown
from peers.venvs import install

from llmctl.bench.environment import cpu_model, describe_environment
from llmctl.errors import ExitCode, LlmctlError

PEERS = {peer.name: peer for module in (llama_cpp, vllm_cpu, ov_genai) for peer in module.contestants()}


def main() -> int:
    """Run; the process's exit code."""
    # Ended from outside, it must still stop the server under test.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = _parser()
    args = parser.parse_args()
    try:
        setup, contestants, plan = _configured(args)
    except (ValueError, LlmctlError) as error:
        parser.error(str(error))
    try:
        claim(setup)
        dense_checkpoint(setup.model, setup.models / "bf16")
    except (PeerError, LlmctlError, OSError) as error:
        say(f"error: {error}")
        return int(ExitCode.RUNTIME)
    missing: dict[str, str] = {}
    versions, models = _prepared(setup, contestants, missing)
    if args.install_only:
        print(json.dumps({"versions": versions, "models": {k: str(v) for k, v in models.items()}}, indent=2))
        return _ended(missing)
    if not models:
        return _ended(missing)
    done = _measured(plan, models, contestants, missing)
    if not done:
        return _ended(missing or {"llmctl": "nothing was measured"})
    _publish(args, plan, contestants, versions, done, missing)
    return _ended(missing)


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def _ended(missing: Mapping[str, str]) -> int:
    for name, reason in missing.items():
        say(f"error: {name}: {reason}")
    return int(ExitCode.RUNTIME if missing else ExitCode.OK)


def _configured(args: argparse.Namespace) -> tuple[Setup, dict[str, Contestant], Plan]:
    """Everything the options say, checked.

    Raises:
        ValueError: one that cannot be honoured.
    """
    work = args.work.expanduser().resolve()
    setup = Setup(
        work=work,
        model=args.model,
        cores=args.cores or tuple(sorted(os.sched_getaffinity(0)))[:2],
        torch=args.torch,
        pip_flags=tuple(shlex.split(args.pip_flags)),
        preload=tuple(path.resolve() for path in args.preload or ()),
    )
    if args.repeats < 1:
        raise ValueError(f"--repeats: expected at least 1, found {args.repeats}")
    _check_json(args.json, work)
    ours = _own(args)
    peers = args.peers if args.peers is not None else ",".join(default_peers(Cpu.here()))
    chosen = ours | {name: PEERS[name] for name in _known(peers, PEERS, "--peers")}
    workloads = tuple(WORKLOADS[name] for name in _known(args.workloads, WORKLOADS, "--workloads"))
    tokenizer = setup.models / "bf16" / "tokenizer.json"
    plan = Plan(setup, workloads, args.repeats, tokenizer, args.start_timeout, args.max_busy / 100, args.idle_wait)
    return setup, chosen, plan


def _check_json(path: Path | None, work: Path) -> None:
    if path is None:
        return
    folder = path.resolve().parent
    if path.is_dir() or not (folder.is_dir() or folder == work):
        raise ValueError(f"--json {path}: expected a file in a folder that exists")


def _own(args: argparse.Namespace) -> dict[str, Contestant]:
    """llmctl's contestants: one engine a ``--engine`` or ``--checkpoint``, by default AWQ weights of the model."""
    serve_args = tuple(shlex.split(args.serve_args))
    found = {}
    for kind in ("checkpoint", "engine"):
        for text in getattr(args, kind) or ():
            name, equals, path = text.rpartition("=")
            name = name if equals else "llmctl"
            if name in found or name in PEERS:
                raise ValueError(f"--{kind} {text}: the name '{name}' is taken; write NAME=DIR")
            if not Path(path).is_dir():
                raise ValueError(f"--{kind} {text}: no such folder")
            where = {kind: str(Path(path).resolve())}
            found[name] = own.contestant(name, serve_args=serve_args, **where)
    return found or {"llmctl": own.contestant(serve_args=serve_args)}


def _known(text: str, known: Mapping[str, object], option: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in known:
            raise ValueError(f"{option}: unknown '{name}': expected some of {', '.join(known)}")
    return names


def default_peers(cpu: Cpu) -> list[str]:
    """Every engine, in the configurations that may be its best on this processor."""
    return [name for name in PEERS if not name.startswith("vllm-") or name in vllm_cpu.names_for(cpu)]


def _prepared(
    setup: Setup, contestants: Mapping[str, Contestant], missing: dict[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, Path]]:
    """Install and convert; versions and model paths of those that can be measured, the others' reasons in missing."""
    versions: dict[str, dict[str, str]] = {}
    models: dict[str, Path] = {}
    for name, contestant in contestants.items():
        try:
            if contestant.install is not None:
                versions[name] = install(setup, contestant.install(setup), say)
            say(f"preparing {contestant.title}")
            models[name] = contestant.prepare(setup)
        except (PeerError, LlmctlError, OSError) as error:
            missing[name] = str(error)
            say(f"{name}: {error}")
    return versions, models


def _measured(
    plan: Plan, models: Mapping[str, Path], contestants: Mapping[str, Contestant], missing: dict[str, str]
) -> list[Visit]:
    done = []
    for outcome in visits(plan, models, contestants, say):
        if isinstance(outcome, Visit):
            done.append(outcome)
        else:
            name, error = outcome
            missing[name] = str(error)
            say(f"{name}: {error}")
    return done


def _publish(
    args: argparse.Namespace,
    plan: Plan,
    contestants: Mapping[str, Contestant],
    versions: Mapping[str, Mapping[str, str]],
    done: Sequence[Visit],
    missing: Mapping[str, str],
) -> None:
    results = Results(done)
    titles = {name: contestant.title for name, contestant in contestants.items()}
    ours = [name for name, contestant in contestants.items() if contestant.install is None]
    environment = describe_environment()
    header = _header(plan, versions, environment, done)
    reasons = {name: _shown_text(plan.setup, reason) for name, reason in missing.items()}
    text = to_markdown(results, plan.workloads, titles, ours, header, reasons)
    document = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "environment": environment,
        "cores": plan.setup.cores,
        "repeats": plan.repeats,
        "versions": versions,
        "missing": missing,
        "header": header[0],
        "titles": titles,
        "own": ours,
        **to_json(results, plan.workloads, ours),
    }
    (plan.setup.work / "report.md").write_text(text, encoding="utf-8")
    (args.json or plan.setup.work / "report.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(text)


def _header(
    plan: Plan,
    versions: Mapping[str, Mapping[str, str]],
    environment: Mapping[str, object],
    done: Sequence[Visit],
) -> list[str]:
    """Machine, method, versions and command lines."""
    model, cores = _shown_place(plan.setup, plan.setup.model), plan.setup.cores
    kinds = ", ".join(Cpu.here().kinds) or "instructions unknown"
    lines = [
        f"{model} on {cpu_model()} ({kinds}), {len(cores)} threads on cores {', '.join(map(str, cores))} of "
        f"{environment['cpu_cores']}; {plan.repeats} interleaved repeats: median (lowest–highest); "
        f"llmctl {environment['llmctl']}, commit {environment['git_commit']}.",
        "",
    ]
    for name, found in versions.items():
        lines.append(f"* {name}: " + ", ".join(f"{package} {version}" for package, version in found.items()))
    first = {v.contestant: v for v in reversed(done)}
    for name, seen in first.items():
        lines.append(f"* `{_shown(plan.setup, seen)}`")
        lines.append(f"  — {name} continues “The capital of France is” with {seen.sample!r}")
    return lines


def _shown(setup: Setup, seen: Visit) -> str:
    """A server's command line, without the places of this machine."""
    variables = [
        f"{key}={':'.join(_shown_place(setup, part) for part in value.split(':'))}"
        for key, value in seen.environment.items()
    ]
    return " ".join([*variables, shlex.join(_shown_word(setup, word) for word in seen.argv)])


def _shown_word(setup: Setup, word: str) -> str:
    """A word of a command line: a place, or an option with one."""
    option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
    return option + equals + _shown_place(setup, value)


def _shown_place(setup: Setup, text: str) -> str:
    """An absolute path as it is seen from the work folder or this checkout, of any other the last part."""
    if text == sys.executable:
        return "python"
    path = Path(text)
    if not path.is_absolute() or text.startswith("//"):
        return text
    for root in (setup.work, Path(__file__).resolve().parents[1]):
        if path != root and path.is_relative_to(root):
            return str(path.relative_to(root))
    return path.name


def _shown_text(setup: Setup, text: str) -> str:
    """A sentence, each path in it shortened."""
    return re.sub(r"""(?<![^\s'"(=])/[^\s'")]+""", lambda found: _shown_place(setup, found[0]), text)


def _cores(text: str) -> tuple[int, ...]:
    try:
        cores = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        cores = ()
    if not cores or not set(cores) <= os.sched_getaffinity(0):
        raise argparse.ArgumentTypeError(f"'{text}': expected usable processors such as 0,1")
    return cores


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", type=Path, required=True, metavar="DIR", help="environments, models, logs; reused when there")
    add("--model", default="demo:smollm2-135m", help="demo name or .gguf file (default: %(default)s)")
    add("--peers", metavar="NAMES", help=f"comma-separated, of {', '.join(PEERS)}; '' for llmctl alone")
    add("--workloads", default=",".join(WORKLOADS), metavar="NAMES", help="comma-separated (default: %(default)s)")
    add("--repeats", type=int, default=3, help="(default: %(default)s)")
    add("--checkpoint", action="append", metavar="[NAME=]DIR", help="llmctl: build an engine from it (repeatable)")
    add("--engine", action="append", metavar="[NAME=]DIR", help="llmctl: serve this cpu engine (repeatable)")
    add("--serve-args", default="", help="further options of llmctl serve, in one string")
    add("--cores", type=_cores, metavar="N,N", help="processors of the servers (default: the first two)")
    add("--install-only", action="store_true", help="install and prepare the models, measure nothing")
    add("--torch", default="torch==2.13.0", help="PyTorch of the peers (default: %(default)s)")
    add("--pip-flags", default="", help="further options of pip install, such as where CPU wheels of PyTorch are")
    add("--preload", action="append", type=Path, metavar="FILE", help="library to preload for vLLM, such as tcmalloc")
    add("--start-timeout", type=float, default=900, help="seconds to readiness (default: %(default)s)")
    add("--max-busy", type=float, default=10, help="wait while more of the machine is busy, %% (default: %(default)s)")
    add("--idle-wait", type=float, default=20, help="but not longer than this, seconds (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="where the JSON goes (default: report.json in --work)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
