"""Jump-ahead on real models: a chunk of forced tokens leaves the output that sampling each of them leaves."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cpu.cpu_engines import cpu_runtime
from fixtures import make_tiny_llama

from llmctl.artifact.request import EngineRequest
from llmctl.checkpoint.opening import open_checkpoint
from llmctl.engine.llm_engine import LLMEngine
from llmctl.engine.request import Request
from llmctl.engine.sampling_params import SamplingParams
from llmctl.engine.scheduler_config import SchedulerConfig
from llmctl.engine.step import Runtime
from llmctl.structured.compiler import GrammarCompiler
from llmctl.structured.spec import GrammarSpec, json_schema
from llmctl.targets.cpu.toolchain import find_compiler
from llmctl.targets.reference.weights import checkpoint_runtime
from llmctl.text.tokenizer import Tokenizer

_FOLDER: list[TemporaryDirectory[str]] = []
BLOCKS, BLOCK = 32, 16


@cache
def _model() -> Path:
    _FOLDER.append(TemporaryDirectory())
    return make_tiny_llama(Path(_FOLDER[0].name) / "model")


@cache
def _reference() -> Runtime:
    return checkpoint_runtime(open_checkpoint(_model()), num_blocks=BLOCKS, block_size=BLOCK)


@cache
def _cpu() -> Runtime:
    sizes = EngineRequest(kv_cache_bytes=BLOCKS * BLOCK * 2 * 2 * 2 * 16 * 4, max_model_len=256, max_num_seqs=8)
    return cpu_runtime(_model(), sizes=sizes, dtype="float32")


def record(**properties: Any) -> GrammarSpec:
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return json_schema(schema, "x")


SHORT = {"type": "string", "maxLength": 3}
SPECS = (
    record(customer_identifier={"type": "boolean"}, number_of_items={"enum": [1, 2, 30]}, postal_code=SHORT),
    record(kind={"enum": ["person of interest", "robot without a name"]}, both={"const": ["one", "and", "another"]}),
    GrammarSpec("regex", "The answer is: (yes|no), because [a-z]{3,9}\\. That is all of it\\."),
    GrammarSpec("choice", '["a first text", "a second text", "another text"]'),
)


@pytest.mark.parametrize(
    "runtime_of",
    [_reference, pytest.param(_cpu, marks=pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler"))],
    ids=["reference", "cpu"],
)
def test_outputs_are_those_of_sampling_every_token(runtime_of: Any) -> None:
    tokenizer, runtime = Tokenizer.from_folder(_model()), runtime_of()
    compiler = GrammarCompiler(tokenizer, runtime.limits.vocab_size, tokenizer.eos_token_ids)
    found = []
    for jumps in (False, True):
        engine = LLMEngine(runtime, SchedulerConfig(), tokenizer.eos_token_ids)
        engine.jumps = jumps
        outputs: dict[str, list[int]] = {}
        for i, spec in enumerate(SPECS * 2):
            params = SamplingParams(max_tokens=60, grammar=spec, temperature=i // len(SPECS), seed=i)
            matcher = compiler.submit(spec, forcing=True).result().matcher()
            engine.add_request(Request(str(i), tokenizer.encode("Say it:"), params, matcher=matcher))
        while engine.has_unfinished():
            for output in engine.step():
                outputs.setdefault(output.request_id, []).extend(output.new_token_ids)
        found.append((outputs, engine.stats()))
    (sampled, before), (jumped, after) = found
    assert sampled == jumped
    assert after.num_forced_tokens > 40
    assert after.num_steps < before.num_steps
