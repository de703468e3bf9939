"""What a quantization did to the model, measured at the end of a run on little text."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmctl.checkpoint.adapters.opening import open_merged
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.config import QuantizeConfig
from llmctl.evaluate.distributions import CheckpointDistributions
from llmctl.evaluate.divergence import Divergence, divergence
from llmctl.evaluate.perplexity import Protocol, longest_context, perplexity_from, scored_windows
from llmctl.targets.options import INT8_PASS

_CONTEXT = 256
INT8_FORMAT = "compressed-tensors-w8a8"
"""The format whose readers round activations to int8: it is measured with them."""
_MAX_TOKENS = 2048  # both models read them: half as much work as one pass over the default calibration text

OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class Quality:
    """The quantized model against the original.

    Attributes:
        text: what ``--eval-text`` named. windows: of ``context`` tokens, one after another.
        seconds: what measuring took.
    """

    text: str
    context: int
    windows: int
    divergence: Divergence
    seconds: float

    @property
    def perplexity_before(self) -> float:
        """Of the original."""
        return perplexity_from(self.divergence.original_nll)

    @property
    def perplexity_after(self) -> float:
        """Of the quantized model."""
        return perplexity_from(self.divergence.nll)

    @property
    def sentence(self) -> str:
        """The text, for people."""
        text = "the built-in text" if self.text == "builtin" else self.text
        return f"{self.divergence.tokens} tokens of {text}, windows of {self.context}"

    def to_json(self) -> dict[str, Any]:
        """JSON data; a standard error that there is none of is None."""
        found = {key: None if value != value else value for key, value in asdict(self.divergence).items()}
        return {
            "text": self.text,
            "context": self.context,
            "windows": self.windows,
            "perplexity_before": self.perplexity_before,
            "perplexity_after": self.perplexity_after,
            **found,
            "seconds": round(self.seconds, 3),
        }


def measure_quality(config: QuantizeConfig, format: str, text: str, on_layer: OnLayer) -> Quality:
    """Compare ``config.output`` with ``config.model`` on the first ``_MAX_TOKENS`` tokens of a text, in float32.

    Adapters that were merged are so in the original, too: a quantized base's error is not counted.

    Args:
        format: of the output.
        on_layer: told how many layers of both models are done.

    Raises:
        LlmctlError: too little text, or models that cannot be compared.
    """
    started = time.monotonic()
    original = open_merged(config.model, config.merge_adapter, "merge_adapter", config.as_family).checkpoint
    quantized = open_checkpoint(Path(config.output))
    context = min(_CONTEXT, longest_context(original) or _CONTEXT)
    _, windows = scored_windows(original, text, Protocol(context, context, _MAX_TOKENS))
    passes = (INT8_PASS,) if format == INT8_FORMAT else ()
    before = CheckpointDistributions(original, windows, lambda done, total: on_layer(done, 2 * total))
    after = CheckpointDistributions(
        quantized, windows, lambda done, total: on_layer(total + done, 2 * total), passes=passes
    )
    found = divergence(before, after, windows)
    return Quality(config.eval_text, context, len(windows), found, time.monotonic() - started)
