"""What sliding windows save: Gemma 3 1B's figures by hand, and what fits because of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmctl.artifact.memory import MemoryPlan, Sizing
from llmctl.artifact.memory_table import memory_document, memory_rows
from llmctl.artifact.request import EngineRequest
from llmctl.graph.families import build_graph
from llmctl.graph.graph import Graph, QuantScheme
from llmctl.graph.kv_groups import KVGroup, whole_context
from llmctl.targets.base import BuildOptions, TargetName
from llmctl.targets.reference.target import ReferenceTarget

GEMMA = build_graph(
    {
        **{"model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64},
        **{"num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256},
        **{"max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6},
    }
)
TOKEN = 2 * 256 * 4  # bytes of a token's keys and values in a layer
BLOCK = 2 * 16 * TOKEN  # of two layers


class WholeContext(ReferenceTarget):
    """A target whose runtimes take one block table a sequence."""

    def kv_groups(self, graph: Graph) -> tuple[KVGroup, ...]:
        return whole_context(graph)


def sizing(target: type[ReferenceTarget] = ReferenceTarget, **request: object) -> Sizing:
    options = BuildOptions("float32", 8192, 16, "float32", ())
    wanted = EngineRequest(**{"budget": 10**10, "max_num_batched_tokens": 512, **request})  # type: ignore[arg-type]
    return Sizing(GEMMA, options, target(TargetName("reference")), wanted, ())


def plan(target: type[ReferenceTarget] = ReferenceTarget, **request: object) -> MemoryPlan:
    return sizing(target, **request).plan()


def test_a_sequence_of_gemma_3_1b_at_8k() -> None:
    found, whole = plan(), plan(WholeContext)
    assert [(group.window, len(group.layers)) for group in found.kv.groups] == [(0, 2)] * 2 + [(512, 2)] * 11
    # A window of 512, of which the step computes the last 512: 1023 positions, which begin anywhere in a block.
    assert found.kv.blocks_of(8192) == 2 * 512 + 11 * 65
    assert found.kv_bytes_of_one == (2 * 512 + 11 * 65 + 1) * BLOCK
    assert found.kv_bytes_of_whole_context == whole.kv_bytes_of_one == 26 * 8192 * TOKEN
    assert whole.kv_bytes_of_one / found.kv_bytes_of_one == pytest.approx(3.83, abs=0.01)


def test_more_sequences_in_the_same_memory() -> None:
    found, whole = (plan(target, kv_cache_bytes=10**9, max_num_seqs=64) for target in (ReferenceTarget, WholeContext))
    assert whole.sequences == pytest.approx(10**9 / (26 * 8192 * TOKEN), abs=0.01)
    # Only one of them can take all of a step's tokens: the others hold a window each.
    blocks = 10**9 // BLOCK - 1
    assert found.sequences == pytest.approx(1 + (blocks - 1739) / (2 * 512 + 11 * 33), abs=0.01)
    assert found.sequences > 4.5 * whole.sequences
    assert found.kv_bytes <= 10**9


def test_the_default_cache_is_for_all_seats() -> None:
    found = plan(max_num_seqs=3, max_model_len=8192)
    assert found.num_blocks == 1739 + 2 * (2 * 512 + 11 * 33)
    assert found.sequences == 3


def test_a_length_that_did_not_fit_fits() -> None:
    base = plan().fixed
    room = base + 26 * 2048 * TOKEN
    assert plan(WholeContext, budget=room).largest_max_model_len == 2048
    found = plan(budget=room)
    assert not plan(WholeContext, budget=room).fits
    assert found.largest_max_model_len == (found.num_blocks - 11 * 65) // 2 * 16 == 7584
    assert plan(budget=room, max_model_len=found.largest_max_model_len).fits
    assert not plan(budget=room, max_model_len=found.largest_max_model_len + 1).fits


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 4 * 10**8), st.sampled_from([1, 8, 512, 5000]), st.booleans())
def test_the_advised_length_fits_and_no_longer_one_does(room: int, tokens: int, asked: bool) -> None:
    base = plan(max_num_batched_tokens=tokens).fixed
    changes = {"budget": 10**10, "kv_cache_bytes": room} if asked else {"budget": base + room}
    best = plan(max_num_batched_tokens=tokens, **changes).largest_max_model_len
    if best:
        assert plan(max_num_batched_tokens=tokens, max_model_len=best, **changes).fits
    if best < GEMMA.max_position:
        assert not plan(max_num_batched_tokens=tokens, max_model_len=best + 1, **changes).fits


def test_short_sequences_keep_one_table() -> None:
    """Nothing is let go of before a sequence is longer than a window and a step."""
    for length in (100, 512, 1000):
        assert plan(max_model_len=length).kv.groups == whole_context(GEMMA)
    assert plan(whole_context=True).kv.groups == whole_context(GEMMA)


def test_the_longest_without_quantization_is_of_all_layouts_too() -> None:
    """Of a plan in one table and of one in groups: what is left for the KV cache is the same."""
    name, weight = next(iter(GEMMA.weights.items()))
    quantized = replace(GEMMA, weights={**GEMMA.weights, name: replace(weight, quant=QuantScheme(4, 32, True))})
    documents = []
    for length in (1000, 8192):
        found = replace(sizing(budget=plan().fixed + 10**8, max_model_len=length), graph=quantized)
        documents.append(memory_document(found, found.plan()))
    assert len(documents[0]["kv_groups"]) == 1 < len(documents[1]["kv_groups"])
    short, long = (document["unquantized"]["largest_max_model_len"] for document in documents)
    assert 512 < short == long


def test_the_table_and_the_document_say_it() -> None:
    found = sizing()
    rows = {row[0].strip(): list(row[1:]) for row in memory_rows(found, found.plan())}
    assert rows["a sequence of that length"] == ["108.8 MiB"]
    assert rows["if 22 sliding layers kept all of it"] == ["416.0 MiB"]
    document = memory_document(found, found.plan())
    assert document["kv_bytes_max_model_len"] == 1740 * BLOCK
    assert document["kv_bytes_max_model_len_without_windows"] == 26 * 8192 * TOKEN
    assert document["kv_groups"] == [{"window": 0, "layers": 2}] * 2 + [{"window": 512, "layers": 2}] * 11
    whole = sizing(WholeContext)
    rows = {row[0].strip(): list(row[1:]) for row in memory_rows(whole, whole.plan())}
    assert rows["22 layers with a sliding window"] == ["keep every token"]


def test_what_does_not_fit_says_that_windows_are_counted() -> None:
    short = plan(budget=1)
    assert "8192 tokens, of which 22 layers keep their sliding window" in short.shortfall()
    assert short.kv_bytes == 0
    assert replace(short, num_blocks=1).kv_bytes == 2 * BLOCK
