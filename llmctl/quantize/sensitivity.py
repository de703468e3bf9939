"""How far the model's output moves when one group of its linears is rounded to few bits.

Every candidate (a group at some bits, rounded to nearest) is a stream of activations of its own from its layer on; all
streams pass a layer while its weights are in memory, so that no more than one layer's are. At the end each stream's
next-token distributions are compared with the unquantized model's: the KL divergence, which no weight or layer error
stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from llmctl.evaluate.divergence import kl_sum
from llmctl.graph.graph import QuantScheme
from llmctl.quantize.rtn import quantize_rtn
from llmctl.targets.reference.context import Env
from llmctl.targets.reference.layerwise import LayerwisePass

_ROWS = 256  # logits in memory at once, of each of two models

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Candidate:
    """Linears of one layer as they might be quantized; ``schemes``: graph weight -> what it is rounded to."""

    layer: int
    schemes: Mapping[str, QuantScheme]


def measure_sensitivity(
    calibration: LayerwisePass, candidates: Sequence[Candidate], on_progress: OnProgress = lambda *_: None
) -> list[float]:
    """``KL(unquantized || with one candidate)`` of each candidate, mean over the pass's tokens, nats.

    Args:
        on_progress: called with how often a candidate has passed a layer, and how often it will have in all.
    """
    last = calibration.graph.num_layers
    total, done = sum(last - candidate.layer for candidate in candidates), 0
    streams: dict[int, Env] = {}
    hidden = calibration.enter()
    calibration.forget(-1)
    for layer in range(last):
        for index, stream in streams.items():
            streams[index] = calibration.run(layer, stream)
        for index, candidate in _of_layer(candidates, layer):
            with _rounded(calibration, candidate):
                streams[index] = calibration.run(layer, hidden)
        hidden = calibration.run(layer, hidden)
        calibration.forget(layer)
        done += len(streams)
        on_progress(done, total)
    found = [0.0] * len(candidates)
    tokens = len(next(iter(hidden.values())))
    for start in range(0, tokens, _ROWS):
        rows = slice(start, start + _ROWS)
        expected = _log_probs(calibration, hidden, rows)
        for index, stream in streams.items():
            found[index] += float(kl_sum(expected, _log_probs(calibration, stream, rows)))
        for index, candidate in _of_layer(candidates, last):
            with _rounded(calibration, candidate):
                found[index] += float(kl_sum(expected, _log_probs(calibration, hidden, rows)))
    calibration.forget(last)
    return [max(value / tokens, 0.0) for value in found]


def _of_layer(candidates: Sequence[Candidate], layer: int) -> list[tuple[int, Candidate]]:
    return [(i, candidate) for i, candidate in enumerate(candidates) if candidate.layer == layer]


@contextmanager
def _rounded(calibration: LayerwisePass, candidate: Candidate) -> Iterator[None]:
    before = {name: calibration.weights[name] for name in candidate.schemes}
    for name, scheme in candidate.schemes.items():
        calibration.weights[name] = quantize_rtn(before[name], scheme).dequantize()
    try:
        yield
    finally:
        for name, weight in before.items():
            calibration.weights[name] = weight


def _log_probs(calibration: LayerwisePass, hidden: Env, rows: slice) -> Tensor:
    return calibration.logits({name: value[rows] for name, value in hidden.items()}).log_softmax(dim=-1)
