#!/usr/bin/env python3
"""Real clients against ``llmctl serve``: each in an environment of its own, all with the same scenarios.

    python scripts/try_clients.py                                   # all of them; the table on stdout
    python scripts/try_clients.py --keep ~/clients --docs           # environments kept; the table in docs/clients.md
    python scripts/try_clients.py --only openai,litellm --record recorded
    python scripts/try_clients.py --url http://127.0.0.1:8000 --api-key KEY --only llm

Clients and versions: ``client_trials/catalog.py``; what each does: ``clients/with_*``. Environments are made under a
temporary folder, which is removed, or under ``--keep``, where they are found again. Clients run with a home of their
own and without this user's variables. The server that is started serves --model with a chat template that can open
reasoning, ``clients/chat_template.jinja``; a server of ``--url`` has to be started likewise. Progress goes to stderr.

Exit codes: 0 all scenarios are well; 1 one failed or was not tried; 2 usage.
"""

from __future__ import annotations

import argparse
import datetime
import json
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from client_trials.catalog import CLIENTS, SCRIPTS, Client
from client_trials.environments import folder_name, install, setup_of
from client_trials.outcomes import Trial
from client_trials.playing import Endpoint, play, untried
from client_trials.recording import Recorder
from client_trials.report import failures, to_json, to_line, to_markdown, to_text
from md_table import with_section
from peers.contest import PeerError
from served import Server, ServerError, serving
from trial_options import chosen, work_folder

from llmctl import __version__
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.checkpoint.resolve import resolve_model
from llmctl.errors import ExitCode, LlmctlError

DOCS = Path(__file__).resolve().parent.parent / "docs" / "clients.md"
MARKERS = ("<!-- clients: scripts/try_clients.py --docs -->", "<!-- end of clients -->")
OPTIONS = (
    *("--chat-template", str(SCRIPTS / "chat_template.jinja"), "--tool-template", "generic"),
    *("--enable-auto-tool-choice", "--reasoning-parser", "qwen3"),
)


def main() -> int:
    """Run; the process's exit code."""
    # Ended from outside, it must still stop the server and take its folder away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = _parser()
    args, extra = parser.parse_known_args()
    try:
        clients = chosen(args.only, {folder_name(client): client for client in CLIENTS})
        if args.docs and len(clients) < len(CLIENTS):
            raise ValueError("--docs: the table is of all clients, so not with --only")
        if args.url and extra:
            raise ValueError(f"unknown option {extra[0]}: only a server that is started here takes further options")
    except ValueError as error:
        parser.error(str(error))
    try:
        with work_folder(args.keep, "llmctl-clients-") as work:
            trials = _tried(args, extra, clients, work)
    except (ServerError, LlmctlError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.RUNTIME)
    _publish(args, trials)
    return 0 if all(o.verdict in ("ok", "none") for t in trials for o in t.outcomes.values()) else 1


def _tried(args: argparse.Namespace, extra: Sequence[str], clients: Sequence[Client], work: Path) -> list[Trial]:
    environments, trials = {}, {}
    setup = setup_of(work, args.model, tuple(args.pip_flags.split()))
    for client in clients:
        try:
            environments[client.name] = install(client, setup, _say)
        except PeerError as error:
            _say(f"NOT TRIED: {client.name}: {error}")
            trials[client.name] = untried(client, str(error))
    if args.install_only:
        return [trials.get(client.name) or untried(client, "--install-only") for client in clients]
    with ExitStack() as stack:
        endpoint = stack.enter_context(_endpoint(args, extra, work))
        recorder = Recorder(endpoint.url) if args.record else None
        address = stack.enter_context(recorder.listening()) if recorder else None

        def tried(client: Client) -> Trial:
            used = endpoint.at(f"{address}/{folder_name(client)}/{{scenario}}") if address else endpoint
            trial = play(client, environments[client.name], used, args.timeout, work)
            _say(to_line(trial))
            return trial

        with ThreadPoolExecutor(args.jobs) as pool:
            ready = [client for client in clients if client.name in environments]
            trials |= {trial.client: trial for trial in pool.map(tried, ready)}
        if recorder is not None:
            recorder.write(args.record)
    return [trials[client.name] for client in clients]


@contextmanager
def _endpoint(args: argparse.Namespace, extra: Sequence[str], work: Path) -> Iterator[Endpoint]:
    tokenizer = _tokenizer(args.model, work / "tokenizer")
    if args.url:
        headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
        server = Server(args.url.rstrip("/"), 0, headers)
        yield Endpoint(server.url, args.api_key, server.model, tokenizer)
        return
    key = args.api_key or secrets.token_hex(8)
    name = args.model.rpartition(":")[2].rpartition("/")[2]
    options = ["--api-key", key, "--served-model-name", name, *OPTIONS, *extra]
    with serving(args.model, options, {"Authorization": f"Bearer {key}"}) as server:
        yield Endpoint(server.url, key, server.model, tokenizer)


def _tokenizer(model: str, folder: Path) -> Path:
    """The model's tokenizer and configuration, for clients that count tokens themselves."""
    source = open_checkpoint(resolve_model(model))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
    for name, content in source.aux_files().items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
    return folder


def _publish(args: argparse.Namespace, trials: Sequence[Trial]) -> None:
    when = datetime.datetime.now(datetime.UTC).date()
    circumstances = f"llmctl {__version__}, {args.model}, {when}; {failures(trials)} scenarios fail."
    print(json.dumps(to_json(trials, circumstances), indent=2) if args.json else to_text(trials))
    if args.docs:
        section = to_markdown(trials, circumstances)
        DOCS.write_text(with_section(DOCS.name, DOCS.read_text(encoding="utf-8"), MARKERS, section), encoding="utf-8")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ", ".join(folder_name(client) for client in CLIENTS)
    add("--only", metavar="NAMES", help=f"comma-separated, of {names}")
    add("--model", default="demo:smollm2-135m", help="what is served, and whose tokenizer is given (%(default)s)")
    add("--url", help="a server that runs already; further options are for the one that is started otherwise")
    add("--api-key", metavar="KEY", help="the server's; of one that is started here: random")
    add("--keep", type=Path, metavar="DIR", help="environments; reused when there")
    add("--install-only", action="store_true", help="make the environments, try nothing")
    add("--jobs", type=int, default=4, help="clients at once (%(default)s)")
    add("--timeout", type=float, default=600, help="seconds for all scenarios of a client (%(default)s)")
    add("--record", type=Path, metavar="DIR", help="what each client sends, a JSON file each, without keys")
    add("--pip-flags", default="", help="further options of pip install")
    add("--json", action="store_true", help="JSON instead of the table")
    add("--docs", action="store_true", help="write the table into docs/clients.md too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
