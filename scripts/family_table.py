"""Write the table of ``docs/families.md``, out of the code's own: ``python scripts/family_table.py``."""

from __future__ import annotations

from pathlib import Path

from md_table import markdown_table, with_section

from llmctl.checkpoint.gguf_families import ARCHITECTURES, gguf_architecture
from llmctl.graph.family import Family
from llmctl.graph.family_table import FAMILIES

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
_MARKERS = ("<!-- families -->", "<!-- end -->")
_READ_AS_LLAMA = {"mistral": "llama"}  # GGUF files of the one are of the other's architecture
_ROPE_LAYERS = {
    "all": "",
    "sliding": "in sliding layers",
    "sliding_if_any": "in sliding layers, if there are any",
    "listed": "in some layers",
}


def table() -> str:
    """A row a family."""
    rows = [
        (f"`{name}`", family.models, _facts(family), ", ".join(_gguf(name)) or "–", family.limits or "–")
        for name, family in sorted(FAMILIES.items())
    ]
    return markdown_table(("`model_type`", "models", "what it is made of", "GGUF", "limits"), rows)


def with_table(page: str) -> str:
    """The page with the table as the code has it."""
    return with_section(PAGE.name, page, _MARKERS, table())


def _gguf(name: str) -> list[str]:
    rows = [row for row, facts in ARCHITECTURES.items() if name == (facts.model_type or row)]
    return [f"`{gguf_architecture(row)}`" for row in rows] + (
        [f"`{_READ_AS_LLAMA[name]}`"] if name in _READ_AS_LLAMA else []
    )


def _facts(family: Family) -> str:
    return "; ".join(fact for fact in (_norms(family), _attention(family), _positions(family), _mlp(family)) if fact)


def _norms(family: Family) -> str:
    names = family.names
    kind = "RMSNorm" if family.norm == "rms" else "LayerNorm" if family.norm_bias else "LayerNorm without bias"
    kind += " (1 + w)" if family.plus_one else ""
    if not names.attn_norm:
        return f"{kind} after each branch"
    return f"{kind} before{' and after' if names.attn_out_norm else ''} each branch"


def _attention(family: Family) -> str:
    norm = {"none": "", "head": "q and k normed by head", "row": "q and k normed whole"}[family.qk_norm]
    window = {
        "none": "",
        "all": "sliding window",
        "switched": "sliding window where it is switched on",
        "by_layer": "sliding window in the upper layers",
        "typed": "sliding window by layer",
    }[family.window]
    window = "" if "use_sliding_window" in family.neutral else window
    cap = "soft caps" if "attn_logit_softcapping" in family.factors else ""
    factors = "scalar multipliers" if {"residual_multiplier", "logit_scale"} & set(family.factors) else ""
    return ", ".join(part for part in (norm, window, cap, factors) if part)


def _positions(family: Family) -> str:
    if family.positions == "learned":
        return "learned positions"
    words = ["RoPE"]
    words += ["of a part of each head"] if family.partial_rotary else []
    words += ["in interleaved pairs"] if family.rope_style == "gptj" else []
    words += [_ROPE_LAYERS[family.rope_layers]]
    words += ["with a base by layer type"] if family.local_theta else []
    return " ".join(word for word in words if word)


def _mlp(family: Family) -> str:
    gated = "gated MLP" if family.gated else "plain MLP"
    return gated + _experts(family) + (" beside attention" if family.parallel else "")


def _experts(family: Family) -> str:
    facts = family.experts
    if facts is None:
        return ""
    where = {"all": "", "stepped": " in some layers", "after": " after the first layers"}[facts.layers]
    how = facts.scores + (" with a correction bias, in groups" if facts.corrected else "")
    shared = " and a shared one" + (" behind a gate" if family.names.shared_switch else "") if facts.shared else ""
    return f"s, experts{where} chosen by {how}{shared}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
