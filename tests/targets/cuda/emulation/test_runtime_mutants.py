"""Every guard in the CUDA runtime is needed: without it, one of the runtime's tests fails. Each in turn."""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import test_runtime_logits
import test_runtime_sampling
import test_runtime_sliding
import test_runtime_steps
from emulator import missing

from llmctl.targets.cuda import buckets, ops
from llmctl.targets.cuda.attention import AttentionShape
from llmctl.targets.cuda.buffers import Buffers, _Planner
from llmctl.targets.cuda.inputs import InputArena, Staging
from llmctl.targets.cuda.ops import StepTensors
from llmctl.targets.cuda.program import Model
from llmctl.targets.cuda.runtime import CudaRuntime
from llmctl.targets.cuda.sampling import DeviceSampler, Sampled

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def _logits(family: str = "llama", quant: str = "dense", kv: str = "float16") -> Callable[[Any], None]:
    return lambda _: test_runtime_logits.run(family, quant, kv, "float16")


def _fed(_: Any) -> None:
    test_runtime_steps.test_a_token_in_flight_is_as_good_as_a_known_one(0.0)


def _refused(_: Any) -> None:
    test_runtime_steps.test_only_what_the_step_before_samples_can_be_fed()


def _read_late(_: Any) -> None:
    test_runtime_steps.test_results_stay_as_they_were()


def _longer(patch: pytest.MonkeyPatch) -> None:
    test_runtime_steps.test_longer_contexts_are_captured_when_they_come(patch)


def _sampled(_: Any) -> None:
    for seed in range(3):
        test_runtime_sampling.test_any_parameters(seed)


def _kept(_: Any) -> None:
    test_runtime_sampling.test_arrays_that_come_again()


def _scored(_: Any) -> None:
    test_runtime_sampling.test_scores_of_prompts()


def _adapted(_: Any) -> None:
    test_runtime_logits.test_every_position_with_adapters("dense", "int8", "float16")


def _few_tokens(_: Any) -> None:
    test_runtime_steps.test_more_sequences_than_tokens()


def _sliding(_: Any) -> None:
    test_runtime_sliding.test_tokens_are_those_of_whole_contexts("int8", eager=False)


def _tables_refused(_: Any) -> None:
    test_runtime_sliding.test_a_table_too_few_is_refused()


Mutant = tuple[Any, str, str, str, Callable[[Any], None]]
MUTANTS: dict[str, Mutant] = {
    # what a step is told
    "padding stores keys": (Staging, "tokens", "own, -1", "own, 0", _logits()),
    "positions start at each chunk": (Staging, "tokens", "flat.positions, 0",
        "[p - flat.positions[0] for p in flat.positions], 0", _logits()),
    "contexts a token short": (Staging, "tokens", "[ends] + 1", "[ends]", _logits()),
    "tables written once": (Staging, "block_tables", "[row] is table", "[row] is not None", _logits()),
    "tables of another width kept": (Staging, "block_tables", "self._width != shape.width", "not self._width",
        _longer),
    "tables held before they are sent": (Staging, "block_tables", "self._staged = (",
        "self._staged = self.arena.held = (", _refused),
    "tables held at another width": (InputArena, "holds", "self.held[0] != width", "False", _longer),
    "tables held of fewer sequences": (InputArena, "holds", "len(self.held[1]) < len(tables)", "False", _logits()),
    "tables held by their length": (InputArena, "holds", "a is b", "len(a) == len(b)", _logits()),
    "tables cut short": (Staging, "block_tables", "[: shape.width]", "[: shape.width - 1]", _longer),
    "tables at another width": (InputArena, "views", "view(shape.sequences, self.groups, shape.width)",
        "view(shape.width, self.groups, shape.sequences).permute(2, 1, 0).contiguous()", _logits()),
    "tables of the first group": (StepTensors, "tables_of", "self._group(layer)", "0", _sliding),
    "slots of the first group": (StepTensors, "slots_of", "self._group(layer)", "0", _sliding),
    "slots of groups in one place": (Staging, "tokens", "[group * shape.tokens : (group + 1) * shape.tokens]",
        "[: shape.tokens]", _sliding),
    "tables of groups are not checked": (Staging, "block_tables", "row % groups", "0", _tables_refused),
    "tables of other sequences are checked": (Staging, "block_tables", "row // groups", "0", _tables_refused),
    "further tables are taken as they come": (CudaRuntime, "execute", "further_slots(plan, self.limits, flat.slots)",
        "[flat.slots]", _tables_refused),
    "rows of the step before": (Staging, "rows", "np.array(flat.rows, np.int64)",
        "np.maximum(np.array(flat.rows, np.int64) - 1, 0)", _logits()),
    "parameters staged once": (Staging, "rows", "given[1] is not value", "False", _kept),
    "parameters staged for fewer rows": (Staging, "rows", "given[0] != padded or ", "", _kept),
    "adapters by sequence": (CudaRuntime, "_adapters", "for _ in piece.token_ids", "for _ in (0,)", _adapted),
    # how steps follow one another
    "nothing is fed": (Staging, "tokens", "source.items()", "()", _fed),
    "fed in the order of the new step": (CudaRuntime, "_fed", "self._row_of[piece.request_id]", "len(found)", _fed),
    "rows of unsampled slices are counted": (CudaRuntime, "execute", "for p in plan.slices if p.sample)",
        "for p in plan.slices)", _fed),
    "any earlier step may be fed": (CudaRuntime, "execute", "self._row_of = {", "self._row_of |= {", _refused),
    "a token of no step": (CudaRuntime, "_fed", "piece.request_id not in self._row_of", "False", _refused),
    "results in one place": (CudaRuntime, "execute", "self._results[turn]", "self._results[0]", _fed),
    "results overwritten": (Sampled, "result", ".numpy().copy()", ".numpy()", _read_late),
    # programs
    "mixed steps are decoded": (CudaRuntime, "_shape", "not flat.scored and len(flat.rows) == tokens", "True",
        _logits()),
    "rows of one token are forgotten": (CudaRuntime, "_shape", "1 in counts", "False", _logits()),
    "steps padded beyond what there is": (CudaRuntime, "_shape", "min(self._padded(tokens), most)",
        "self._padded(tokens)", _logits()),
    "graphs whatever the width": (CudaRuntime, "_graph_of", "key = bucket, width", "key = bucket, 0", _longer),
    "contexts of the first width": (CudaRuntime, "_shape", "context_width(longest, self.limits)",
        "context_width(1, self.limits)", _longer),
    "more sequences than tokens": (CudaRuntime, "__init__",
        "min(sizes.max_num_seqs, sizes.max_num_batched_tokens)", "sizes.max_num_seqs", _few_tokens),
    "nothing is gathered": (Model, "bind_head", "if every:", "if True:", _logits()),
    "no residual": (ops, "_residual", 'if "residual" in job.attrs', "if False", _logits("phi", "w4")),
    "one outputs for splits": (Buffers, "_view", "place.start : place.start + place.columns",
        "0 : place.columns", _logits()),
    "logits in place of hidden states": (_Planner, "_take", "s.on_rows == on_rows", "True", _scored),
    "keys without their scale": (StepTensors, "cache_scales", "self.kv_scales.get(layer, ())",
        "[torch.ones_like(s) for s in self.kv_scales.get(layer, ())]", _logits(kv="int8")),
    "values without their unit": (AttentionShape, "value_unit", "256.0 * value_scale", "128.0 * value_scale",
        _logits(kv="fp8_e4m3")),
    # sampling
    "logits are changed": (DeviceSampler, "_widened", "wide.copy_(logits[:rows])", "wide", _sampled),
    "masks are ignored": (DeviceSampler, "_sample_adjusted", "None if mask is None", "None if True",
        _sampled),
    "biases are ignored": (DeviceSampler, "_sample_adjusted", "if batch.bias_rows is not None and",
        "if False and", _sampled),
    "log-probabilities after bias": (DeviceSampler, "describe", "self._widened(logits, n)",
        "self._wide[: n * self._vocab].view(n, self._vocab)", _sampled),
    "penalties by row of the batch before": (DeviceSampler, "_penalise", "upload(starts)", "upload(starts * 0)",
        _sampled),
    "scored rows are sampled": (CudaRuntime, "execute", "if flat.scored:", "if False:", _scored),
    "another log-probability among the most likely": (DeviceSampler, "describe",
        "own[:, None] + (wide.gather(1, ids) - wide.gather(1, tokens[:, None].long()))",
        "wide.gather(1, ids) - (wide.gather(1, tokens[:, None].long()) - own[:, None])", _scored),
    "scores of the first rows": (CudaRuntime, "_score", "first + start, first + start + len(wanted)",
        "start, start + len(wanted)", _scored),
}  # fmt: skip
"""What goes wrong: where, the text that is right, a text that is wrong, and the test that finds it."""


def mutate(patch: pytest.MonkeyPatch, owner: Any, name: str, right: str, wrong: str) -> None:
    """Put a function in the place of ``owner.name`` in which ``right`` reads ``wrong``."""
    module = owner if inspect.ismodule(owner) else sys.modules[owner.__module__]
    text = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert text.count(right) == 1, f"{name}: {text.count(right)} times {right}"
    found: dict[str, Any] = {}
    code = compile(text.replace(right, wrong), module.__file__ or "", "exec", __future__.annotations.compiler_flag)
    exec(code, vars(module), found)
    patch.setattr(owner, name, found[name])


def _forget_runtimes() -> None:
    for cached in (test_runtime_steps._shared, test_runtime_sampling._runtime):
        cached.cache_clear()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_runtime_without_it_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *mutant, check = MUTANTS[name]
    _forget_runtimes()
    mutate(monkeypatch, *mutant)
    try:
        with pytest.raises((AssertionError, RuntimeError, LookupError, ValueError, pytest.fail.Exception)):
            check(monkeypatch)
    finally:
        _forget_runtimes()


def test_the_runtime_as_it_is_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants' tests, called as they are called above."""
    _forget_runtimes()
    for check in dict.fromkeys(check for *_, check in MUTANTS.values()):
        with monkeypatch.context() as patch:
            check(patch)


def test_steps_are_padded() -> None:
    """Which these mutants need: some of them show in padding alone."""
    assert buckets.padded(22) != 22
    assert buckets.padded(3, buckets.sequence_buckets(5)) == 4
