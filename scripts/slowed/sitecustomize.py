"""Makes every step of a worker longer, for ``scripts/compare_experiment.py``: a slowdown whose size is known.

Python imports a module of this name when it starts, if its folder is in PYTHONPATH. ``SLOWED_STEPS`` is the share of a
step's time that is spent again after it, busy, as a slower kernel would.
"""

import os
import sys
import time

SHARE = float(os.environ.get("SLOWED_STEPS", "0"))

if SHARE and "llmctl.serving.worker" in sys.orig_argv:
    from llmctl.engine.llm_engine import LLMEngine

    _step = LLMEngine.step

    def _slowed(self: LLMEngine) -> object:
        start = time.perf_counter()
        made = _step(self)
        now = time.perf_counter()
        end = now + SHARE * (now - start)
        while time.perf_counter() < end:
            pass
        return made

    LLMEngine.step = _slowed  # type: ignore[method-assign, assignment]
    print(f"slowed: every step takes {1 + SHARE:.4f} times as long", file=sys.stderr, flush=True)
