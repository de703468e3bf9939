"""The Interpreter as quantization uses it: layer by layer, with hooks, over a scratch cache, with changing weights."""

from __future__ import annotations

from collections import ChainMap

import numpy as np
import pytest
import torch
from family_models import VOCAB, family_model

from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Op, QuantScheme
from llmctl.targets.batch import Batch, packed_batch
from llmctl.targets.reference.context import Env, StepContext, allocate_cache
from llmctl.targets.reference.interpreter import BeforeOp, Interpreter, Program
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
    return Interpreter(model.graph, ChainMap({}, CheckpointWeights(model.graph, model.checkpoint)))


def replace(interpreter: Interpreter, name: str, weight: torch.Tensor | QuantizedWeight) -> None:
    """As quantization does: the source gives another weight from now on, and the copy in use is released."""
    interpreter.weights[name] = weight  # type: ignore[index]
    interpreter.release_weight(name)


@pytest.mark.parametrize("case", ["llama", "mistral", "qwen3", "phi", "gpt2"])
def test_layer_by_layer_over_one_layers_cache_is_the_whole_model(case: str) -> None:
    interpreter, batch = make(case), packed_batch(sequences(), block_size=4)
    graph = interpreter.graph
    env = scratch(interpreter, batch, []).inputs()
    for layer in range(-1, graph.num_layers + 1):
        ctx = scratch(interpreter, batch, [layer] if 0 <= layer < graph.num_layers else [])
        ops = graph.layer_ops(layer)
        later = {b for op in graph.ops if op.layer > layer for b in op.inputs} | {LOGITS, POSITIONS}
        env = interpreter.program(ops, later)(env, ctx)
        assert set(env) <= later | {INPUT_IDS}
    for row, ids in enumerate(sequences()):
        assert float((env[LOGITS][row] - family_model(case).logits(ids)[-1]).abs().max()) < 1e-4


def everything(interpreter: Interpreter) -> Program:
    graph = interpreter.graph
    return interpreter.program(graph.ops, graph.buffers)


def run_all(interpreter: Interpreter, before: BeforeOp | None = None) -> Env:
    ctx = scratch(interpreter, packed_batch(sequences()))
    return everything(interpreter)(ctx.inputs(), ctx, before)


def test_the_hook_comes_before_every_op_and_sees_its_inputs() -> None:
    interpreter = make("llama")
    seen: list[tuple[Op, torch.Tensor]] = []

    def before(op: Op, env: Env) -> bool:
        assert env.keys().isdisjoint(op.outputs)
        seen.append((op, env[op.inputs[0]]))
        return False

    env = run_all(interpreter, before)
    assert tuple(op for op, _ in seen) == interpreter.graph.ops
    for op, x in seen:
        if op.kind == "linear":
            weight = interpreter.weight(op.weights[0])
            torch.testing.assert_close(env[op.outputs[0]], x @ weight.T, atol=1e-5, rtol=1e-5)


def test_the_hook_ends_the_run_before_an_op() -> None:
    interpreter, last = make("llama"), "layers.1.o_proj"
    env = run_all(interpreter, lambda op, _: op.name == last)
    at = [op.name for op in interpreter.graph.ops].index(last)
    written = {name for op in interpreter.graph.ops[:at] for name in op.outputs}
    assert env.keys() == written | {INPUT_IDS, POSITIONS}


def test_a_program_keeps_what_it_is_told_and_drops_the_rest() -> None:
    interpreter = make("llama")
    ctx = scratch(interpreter, packed_batch(sequences()))
    sizes: list[int] = []
    program = interpreter.program(interpreter.graph.ops, ("layers.0.act", LOGITS))
    env = program(ctx.inputs(), ctx, lambda _, env: bool(sizes.append(len(env))))  # type: ignore[func-returns-value]
    assert set(env) == {"layers.0.act", LOGITS}
    assert max(sizes) < 9


@pytest.mark.parametrize("name", ["layers.1.o_proj.weight", "layers.2.mlp_norm.weight", "embed.weight"])
def test_a_replaced_weight_is_used_at_once(name: str) -> None:
    model, interpreter = family_model("llama"), make("llama")
    program, ctx = everything(interpreter), scratch(interpreter, packed_batch(sequences()))
    before = program(ctx.inputs(), ctx)[LOGITS]
    changed = interpreter.graph.weights[name]
    replacement = torch.randn(changed.shape, generator=torch.Generator().manual_seed(1))
    replace(interpreter, name, replacement)
    changed_model = Interpreter(model.graph, {**CheckpointWeights(model.graph, model.checkpoint), name: replacement})
    expected = run_all(changed_model)[LOGITS]
    for found in (program(ctx.inputs(), ctx), run_all(interpreter)):
        torch.testing.assert_close(found[LOGITS], expected, atol=0, rtol=0)
    assert float((expected - before).abs().max()) > 0.01
    replace(interpreter, name, torch.zeros(3))
    with pytest.raises(ValueError, match=f"weight '{name}': expected shape"):
        interpreter.weight(name)


def test_a_weight_replaced_by_the_hook_is_used_by_the_next_op() -> None:
    interpreter, name = make("llama"), "layers.1.o_proj.weight"
    replacement = torch.randn(interpreter.graph.weights[name].shape, generator=torch.Generator().manual_seed(1))

    def before(op: Op, _: Env) -> bool:
        if name in op.weights:
            replace(interpreter, name, replacement)
        return False

    env = run_all(interpreter, before)
    found, x = env["layers.1.o_proj"], env["layers.1.attention"]
    torch.testing.assert_close(found, x @ replacement.T, atol=1e-5, rtol=1e-5)


def test_an_override_executes_an_op_whatever_becomes_of_its_weights() -> None:
    interpreter, name = make("llama"), "layers.1.o_proj"
    program, plain = everything(interpreter), interpreter.bound(name)
    ctx = scratch(interpreter, packed_batch(sequences()))
    expected = program(ctx.inputs(), ctx)[LOGITS]
    ran: list[str] = []

    def run(env: Env, ctx: StepContext) -> None:
        ran.append(name)
        plain(env, ctx)

    interpreter.override(name, run)
    torch.testing.assert_close(program(ctx.inputs(), ctx)[LOGITS], expected, atol=0, rtol=0)
    interpreter.release_weight(f"{name}.weight")
    run_all(interpreter)
    assert ran == [name] * 2


def test_a_quantized_weight_is_dequantized() -> None:
    interpreter, name = make("llama"), "layers.0.down_proj.weight"
    rng = torch.Generator().manual_seed(0)
    weight = QuantizedWeight(
        torch.randint(0, 16, (60, 84), generator=rng).to(torch.uint8),
        torch.rand(60, 4, generator=rng),
        torch.randint(0, 16, (60, 4), generator=rng).to(torch.uint8),
        QuantScheme(4, 21, False),
    )
    replace(interpreter, name, weight)
    torch.testing.assert_close(interpreter.weight(name), weight.dequantize(torch.float32), atol=0, rtol=0)
    run_all(interpreter)
