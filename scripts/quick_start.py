"""Run README's quick start and write what it printed below it: ``python scripts/quick_start.py``, on a quiet machine.

Of each command the lines that a reader looks for are kept; the rest is what the guide shows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from md_table import with_section

from llmctl.bench.local_server import running

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MARKERS = ("<!-- output: scripts/quick_start.py -->", "<!-- end of output -->")
KEPT = {
    "build": r"^engine: ",
    "run": r".",
    "serve": r"ready in|^│ (model|runs|context|URL|page) ",
    "bench": r"^ *(output throughput|ms|TTFT|ITL)\b|^(pass|FAIL) ",
}
"""By command: the lines of its output that are shown."""
_WIDTH = {"COLUMNS": "80"}


def commands(readme: str) -> list[str]:
    """The lines of the quick start."""
    block = readme.partition("## Quick start\n")[2].partition("```bash\n")[2].partition("```")[0]
    return block.strip().splitlines()


def shown(command: str, output: str) -> list[str]:
    """The lines of a command's output that are kept; of an answer to a chat, its text.

    Raises:
        ValueError: there are none.
    """
    words = shlex.split(command)
    if words[0] == "curl":
        return textwrap.wrap(json.loads(output)["choices"][0]["message"]["content"].strip(), 100)
    lines = [line.rstrip() for line in output.splitlines() if re.search(KEPT[words[1]], line)]
    if not lines:
        raise ValueError(f"nothing of the output of '{command}' is what is looked for:\n{output}")
    if words[1] == "run":
        return [part for line in lines for part in textwrap.wrap(line, 100)]
    return [re.sub(r"^[│╭─ ]+|[│╮─ ]+$", "", line) if re.search("[│╭]", line) else line for line in lines]


def section(printed: list[tuple[str, list[str]]]) -> str:
    """What stands between the markers: each command's name with what it printed."""
    lines = [line for name, kept in printed for line in (f"$ {name}", *kept)]
    return "```text\n" + "\n".join(lines) + "\n```"


def main() -> int:
    """Run everything; 0."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    readme = README.read_text(encoding="utf-8")
    printed = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack, contextlib.chdir(folder):
        url = ""
        for command in commands(readme):
            words = shlex.split(command)
            name = "curl …" if words[0] == "curl" else f"llmctl {words[1]} …"
            print(name, file=sys.stderr, flush=True)
            program = [sys.executable, "-m", "llmctl"] if words[0] == "llmctl" else ["curl", "-fsS"]
            if words[:2] == ["llmctl", "serve"]:
                server = stack.enter_context(running([*program, *words[1:]], environment=_WIDTH))
                url, output = server.url, server.announced()
            else:
                arguments = [word.replace("http://127.0.0.1:8000", url) for word in words[1:]]
                done = subprocess.run([*program, *arguments], capture_output=True, text=True, env=os.environ | _WIDTH)
                if done.returncode:
                    sys.exit(f"{command}\nexit code {done.returncode}\n{done.stdout}{done.stderr}")
                # Progress and speed of an answer are on stderr; how a build ended is, too.
                output = done.stdout if words[1] == "run" else done.stdout + done.stderr
            printed.append(
                (name, [line.replace(url or "\0", "http://127.0.0.1:8000") for line in shown(command, output)])
            )
    README.write_text(with_section(README.name, readme, MARKERS, section(printed)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
