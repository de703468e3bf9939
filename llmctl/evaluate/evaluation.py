"""``llmctl eval``: one model on a text, alone or against another, with all that makes the figures comparable."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

from llmctl.artifact.loader import is_engine
from llmctl.checkpoint.resolve import resolve_model
from llmctl.checkpoint.unknown_family import is_unknown
from llmctl.config import EvalConfig
from llmctl.errors import UsageError
from llmctl.evaluate.distributions import Window
from llmctl.evaluate.divergence import Divergence, divergence, spread_windows
from llmctl.evaluate.eval_text import read_text
from llmctl.evaluate.perplexity import Protocol, perplexity_from, score, token_digest
from llmctl.evaluate.scored_model import ScoredModel, open_scored

_CONTEXT = 1024

Show = Callable[[str, str, int, int], None]
"""(what is counted, the one just done, done, in all), as the progress bars of the commands take it."""


@dataclass(frozen=True)
class TextProtocol:
    """How the text was cut. ``stride`` None: windows spread over it; ``tokens``: those the windows were taken from."""

    text: str
    tokens: int
    text_sha256: str
    tokenizer_sha256: str
    context: int
    stride: int | None
    windows: int
    scored_tokens: int

    @property
    def sentence(self) -> str:
        """For people."""
        text = "the built-in text" if self.text == "builtin" else self.text
        how = "spread evenly" if self.stride is None else f"stride {self.stride}"
        return f"{self.windows} windows of {self.context} tokens of {text}, {how}: {self.scored_tokens} tokens scored"


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        arithmetic: what the model computes in; against_arithmetic: what the other one does.
        nll: mean negative log-likelihood of the scored tokens, nats.
        divergence: from ``against``, None without it.
    """

    model: str
    arithmetic: str
    against: str
    against_arithmetic: str
    protocol: TextProtocol
    nll: float
    divergence: Divergence | None
    seconds: float

    @property
    def perplexity(self) -> float:
        """``exp(nll)``."""
        return perplexity_from(self.nll)

    def figures(self) -> dict[str, float | None]:
        """Every figure by name; a standard error is None with fewer than two windows."""
        found: dict[str, float | None] = {"perplexity": self.perplexity, "nll": self.nll}
        if self.divergence is not None:
            d = self.divergence
            found |= {"original_perplexity": perplexity_from(d.original_nll), "original_nll": d.original_nll}
            found |= {"delta_nll": d.delta_nll, "delta_nll_error": d.delta_nll_error}
            found |= {"kl": d.kl, "kl_error": d.kl_error, "top1_agreement": d.top1}
        return {name: None if value is None or isnan(value) else value for name, value in found.items()}

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON data."""
        models: dict[str, Any] = {"model": self.model, "arithmetic": self.arithmetic}
        if self.divergence is not None:
            models |= {"against": self.against, "against_arithmetic": self.against_arithmetic}
        return {**models, "protocol": asdict(self.protocol), **self.figures(), "seconds": round(self.seconds, 3)}


def evaluate(config: EvalConfig, show: Show) -> Evaluation:
    """Score ``config.model`` on the text, and compare it with ``config.against`` if there is one.

    Raises:
        UsageError: options that cannot be honoured; models with different tokenizers.
        LlmctlError: as opening and running the models.
    """
    started = time.monotonic()
    if not config.model:
        raise UsageError("MODEL: expected an engine, a checkpoint or demo:smollm2-135m", param="model")
    text = read_text(config.text, "text", optional=False)
    assert text is not None
    families = families_of(config)
    model = open_scored(config.model, config.activations, families[0])
    against = open_scored(config.against, as_family=families[1]) if config.against else None
    protocol, windows = _cut(config, model, against, text)
    found = _measure(model, against, windows, show)
    return Evaluation(
        model=config.model,
        arithmetic=model.arithmetic,
        against=config.against,
        against_arithmetic="" if against is None else against.arithmetic,
        protocol=protocol,
        nll=found.nll if isinstance(found, Divergence) else found,
        divergence=found if isinstance(found, Divergence) else None,
        seconds=time.monotonic() - started,
    )


def families_of(config: EvalConfig) -> tuple[str, str]:
    """What MODEL and --against are read as: ``--as`` is for those whose own family is not known, one at least.

    Raises:
        UsageError: there is none.
        ModelNotFoundError, CheckpointError: as ``resolve_model`` and ``is_unknown``.
    """
    if not config.as_family:
        return "", ""
    names = (config.model, config.against)
    unknown = [bool(name) and not is_engine(Path(name)) and is_unknown(resolve_model(name)) for name in names]
    if not any(unknown):
        raise UsageError(
            f"--as {config.as_family}: {' and '.join(filter(None, names))}: of no unknown family",
            fix="leave --as out",
            param="as_family",
        )
    return config.as_family * unknown[0], config.as_family * unknown[1]


def _cut(
    config: EvalConfig, model: ScoredModel, against: ScoredModel | None, text: str
) -> tuple[TextProtocol, list[Window]]:
    longest = min((m.longest for m in (model, against) if m is not None and m.longest is not None), default=_CONTEXT)
    context = min(_CONTEXT, longest) if config.context is None else config.context
    if context > longest:
        raise UsageError(f"--context {context}: the longest context is {longest}", param="context")
    if config.max_tokens is not None and config.max_tokens < 2:
        raise UsageError(f"--max-tokens {config.max_tokens}: expected at least 2", param="max_tokens")
    tokens = _tokens(config, model, against, text)[: config.max_tokens]
    stride = None
    if config.windows is None:
        stride = context if config.stride is None else config.stride
        windows = Protocol(context, stride).windows(tokens)
    elif config.stride is not None:
        raise UsageError("--windows, --stride: windows are spread or follow a stride, not both", param="stride")
    else:
        windows = spread_windows(tokens, context, config.windows)
    scored = sum(count for _, count in windows)
    digests = (token_digest(tokens), model.tokenizer_sha256)
    return TextProtocol(config.text, len(tokens), *digests, context, stride, len(windows), scored), windows


def _tokens(config: EvalConfig, model: ScoredModel, against: ScoredModel | None, text: str) -> list[int]:
    """The text's token ids, which must mean the same to both models.

    Raises:
        UsageError: they do not.
    """
    tokenizer = model.tokenizer()
    tokens = tokenizer.encode(text, add_special_tokens=False)
    if against is None or against.tokenizer_sha256 == model.tokenizer_sha256:
        return tokens
    # That of a GGUF file is written anew: the same vocabulary in other bytes, with names for ids that had none.
    other = against.tokenizer()
    pairs = (
        (tokenizer.id_to_token(i), other.id_to_token(i)) for i in range(max(tokenizer.vocab_size, other.vocab_size))
    )
    if any(one != two for one, two in pairs if None not in (one, two)) or other.encode(text, False) != tokens:
        raise UsageError(
            f"--against {config.against}: has another tokenizer than {config.model}; distributions do not compare",
            param="against",
        )
    return tokens


def _measure(
    model: ScoredModel, against: ScoredModel | None, windows: Sequence[Window], show: Show
) -> Divergence | float:
    def layers(whose: str, done: int, total: int) -> None:
        show(f"layers of the {whose}", f"layer {done - 1}", done, total)

    def tokens(done: int, total: int) -> None:
        show("tokens scored", f"token {done}", done, total)

    with ExitStack() as stack:
        if against is None:
            return score(stack.enter_context(model.distributions(windows, partial(layers, "model"))), windows, tokens)
        original = stack.enter_context(against.distributions(windows, partial(layers, "original")))
        own = stack.enter_context(model.distributions(windows, partial(layers, "model")))
        return divergence(original, own, windows, tokens)
