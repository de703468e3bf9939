"""Write the tables of ``docs/formats.md``, out of the code's own: ``python scripts/format_tables.py``.

Each stands between two comments, ``<!-- NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

from format_sizes import sizes
from md_table import markdown_table

from llmctl.checkpoint.gguf_blocks import BLOCK_FORMATS
from llmctl.checkpoint.gguf_families import ARCHITECTURES, ROW_OF_FAMILY, gguf_architecture
from llmctl.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from llmctl.checkpoint.gguf_tokenizer import TOKENIZER_MODELS
from llmctl.checkpoint.methods import METHODS, REFUSED
from llmctl.checkpoint.output_format import FORMATS
from llmctl.graph.graph import QuantScheme

PAGE = Path(__file__).resolve().parent.parent / "docs" / "formats.md"


def methods() -> str:
    """Hugging Face folders: what is read."""
    rows = [(f"`{name}`", method.files, method.becomes) for name, method in METHODS.items()]
    return markdown_table(("`quant_method`", "files", "in an engine"), rows)


def refused() -> str:
    """Hugging Face folders: what is not read, and what to use."""
    rows = [(f"`{name}`", what, instead) for name, (what, instead) in REFUSED.items()]
    return markdown_table(("`quant_method`", "what it is", "instead"), rows)


def blocks() -> str:
    """GGUF's matrices."""
    rows = [(name, _codes(f.scheme), str(f.scheme.group_size)) for name, f in BLOCK_FORMATS.items()]
    return markdown_table(("ggml type", "in an engine", "columns a scale"), rows)


def gguf() -> str:
    """What else a GGUF file may be of."""
    rows = [
        ("architectures", ", ".join(sorted(set(map(gguf_architecture, ARCHITECTURES))))),
        ("written from `model_type`", ", ".join(sorted(ROW_OF_FAMILY))),
        ("tokenizer models", ", ".join(f"{name} ({what})" for name, what in TOKENIZER_MODELS.items())),
        ("pre-tokenizers of byte-level BPE (`gpt2`)", ", ".join(PRE_TOKENIZERS)),
    ]
    return markdown_table(("", "known"), rows)


def written() -> str:
    """What is written."""
    rows = [(f"`{name}`", row.holds, row.readers) for name, row in FORMATS.items()]
    return markdown_table(("format", "holds", "read by"), rows)


TABLES = {"methods": methods, "refused": refused, "blocks": blocks, "gguf": gguf, "sizes": sizes, "written": written}


def with_tables(page: str) -> str:
    """The page with every table as the code has it."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        page, count = pattern.subn(lambda found, made=table(): f"{found[1]}{made}\n{found[2]}", page)
        assert count == 1, f"one place for '{name}'"
    return page


def _codes(scheme: QuantScheme) -> str:
    offset = "a minimum" if scheme.minimum else f"the zero {1 << (scheme.bits - 1)}"
    return f"{scheme.bits}-bit codes, {offset}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
