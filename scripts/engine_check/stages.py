"""Where the time of opening an engine goes: ``python -m engine_check.stages FOLDER [SECONDS SINCE THE EPOCH]``.

Does what a server's worker does, stage by stage, and prints a JSON object of seconds: from the moment given (when the
process was asked for) to Python's first line, the imports, and every stage after them.
"""

from __future__ import annotations

import time

_BEGAN = time.time()

import json  # noqa: E402
import sys  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402

from engine_check.loads import make_engine  # noqa: E402
from llmctl.artifact.loader import load_engine  # noqa: E402
from llmctl.artifact.request import EngineRequest  # noqa: E402
from llmctl.artifact.start import open_runtime  # noqa: E402
from llmctl.text.tokenizer import Tokenizer  # noqa: E402


def main(folder: Path, asked: float) -> dict[str, float]:
    """Seconds by stage."""
    marks = [("process", asked), ("imports", _BEGAN), ("checks and mapping", time.time())]
    loaded = load_engine(folder, EngineRequest())
    marks.append(("runtime: weights, buffers, graphs", time.time()))
    runtime = open_runtime(loaded)
    marks.append(("tokenizer", time.time()))
    Tokenizer.from_folder(folder)
    marks.append(("engine", time.time()))
    make_engine(runtime)
    marks.append(("", time.time()))
    runtime.close()
    found = {name: round(end - start, 3) for (name, start), (_, end) in pairwise(marks)}
    return found | {"in all": round(marks[-1][1] - asked, 3)}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else _BEGAN)))
