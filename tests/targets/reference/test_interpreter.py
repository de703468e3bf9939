"""The Interpreter as quantization uses it: layer by layer, with hooks, over a scratch cache, with changing weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from family_models import VOCAB, family_model

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Op, QuantScheme
from llmctl.targets.batch import Batch, packed_batch
from llmctl.targets.reference.context import StepContext, allocate_cache
from llmctl.targets.reference.interpreter import Interpreter
from llmctl.targets.reference.weights import CheckpointWeights


def sequences() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCAB, n).tolist() for n in (11, 1, 17)]


def scratch(interpreter: Interpreter, batch: Batch, layers: list[int] | None = None) -> StepContext:
    blocks = int(batch.block_tables.max()) + 1
    cache = allocate_cache(interpreter.graph, blocks, batch.block_size, interpreter.dtype, layers)
    return interpreter.context(batch, cache)


def make(case: str) -> Interpreter:
    model = family_model(case)
    return Interpreter(model.graph, CheckpointWeights(model.graph, model.checkpoint))


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3", "phi", "gpt2"])
def test_layer_by_layer_over_one_layers_cache_is_the_whole_model(case: str) -> None:
    interpreter, batch = make(case), packed_batch(sequences(), block_size=4)
    graph = interpreter.graph
    env = scratch(interpreter, batch, []).inputs()
    for layer in range(-1, graph.num_layers + 1):
        ctx = scratch(interpreter, batch, [layer] if 0 <= layer < graph.num_layers else [])
        ops = graph.layer_ops(layer)
        later = {b for op in graph.ops if op.layer > layer for b in op.inputs} | {LOGITS, POSITIONS}
        env = interpreter.run(ops, env, ctx, keep=later)
        assert set(env) <= later | {INPUT_IDS}
    for row, ids in enumerate(sequences()):
        assert float((env[LOGITS][row] - family_model(case).logits(ids)[-1]).abs().max()) < 1e-4


def test_the_hook_sees_every_linear_and_its_input() -> None:
    interpreter, batch = make("llama"), packed_batch(sequences())
    seen: list[tuple[Op, torch.Tensor]] = []
    ctx = scratch(interpreter, batch)
    env = interpreter.run(interpreter.graph.ops, ctx.inputs(), ctx, on_linear=lambda op, x: seen.append((op, x)))
    assert [op for op, _ in seen] == list(interpreter.graph.linears())
    for op, x in seen:
        weight = interpreter.weight(op.weights[0])
        torch.testing.assert_close(env[op.outputs[0]], x @ weight.T, atol=1e-5, rtol=1e-5)


def run_all(interpreter: Interpreter) -> torch.Tensor:
    ctx = scratch(interpreter, packed_batch(sequences()))
    return interpreter.run(interpreter.graph.ops, ctx.inputs(), ctx)[LOGITS]


@pytest.mark.parametrize("name", ["layers.1.o_proj.weight", "layers.2.mlp_norm.weight", "embed.weight"])
def test_a_replaced_weight_is_used_at_once(name: str) -> None:
    model, interpreter = family_model("llama"), make("llama")
    before = run_all(interpreter)
    changed = interpreter.graph.weights[name]
    replacement = torch.randn(changed.shape, generator=torch.Generator().manual_seed(1))
    interpreter.set_weight(name, replacement)
    interpreter.release_weight(name)  # frees the copy, keeps the replacement
    expected = Interpreter(model.graph, {**CheckpointWeights(model.graph, model.checkpoint), name: replacement})
    torch.testing.assert_close(run_all(interpreter), run_all(expected), atol=0, rtol=0)
    assert float((run_all(interpreter) - before).abs().max()) > 0.01
    with pytest.raises(ValueError, match=f"weight '{name}': expected shape"):
        interpreter.set_weight(name, torch.zeros(3))
    with pytest.raises(KeyError):
        interpreter.set_weight("nothing", torch.zeros(3))


def test_a_quantized_weight_is_dequantized() -> None:
    interpreter, name = make("llama"), "layers.0.down_proj.weight"
    rng = torch.Generator().manual_seed(0)
    weight = QuantizedWeight(
        torch.randint(0, 16, (60, 84), generator=rng).to(torch.uint8),
        torch.rand(60, 4, generator=rng),
        torch.randint(0, 16, (60, 4), generator=rng).to(torch.uint8),
        QuantScheme(4, 21, False),
    )
    interpreter.set_weight(name, weight)
    torch.testing.assert_close(interpreter.weight(name), weight.dequantize(torch.float32), atol=0, rtol=0)
    run_all(interpreter)
