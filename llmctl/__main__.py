"""The ``llmctl`` command, also as ``python -m llmctl``."""

from __future__ import annotations

import contextlib
import sys


def main() -> None:
    """Entry point of the console script: for ``serve``, the worker is started before anything else is imported."""
    given = sys.argv[1:]
    starts = given[:1] == ["serve"] and not {"-h", "--help"} & set(given)
    with contextlib.ExitStack() as stack:
        worker = None
        if starts:
            from llmctl.serving.spawned import early_worker

            with contextlib.suppress(OSError):  # no room for a process: the command tries again, and says so
                worker = stack.enter_context(early_worker())
        from llmctl.cli.main import run_command

        run_command(worker)


if __name__ == "__main__":
    main()
