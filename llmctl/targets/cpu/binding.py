"""Bind a Graph to native op descriptors: once, with every buffer planned, so that a step allocates nothing.

Two passes. ``Lowering`` turns each op into a ``Bound`` record whose operands are named storages, inserting the ops that
prepare a linear's operand (int8 codes or bf16) unless the norm before it can write them itself. ``plan_arena`` gives
every storage an offset in one arena by the lifetime of its contents. Descriptors then follow by address arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmctl.errors import UnsupportedModelError
from llmctl.graph.graph import INPUT_IDS, LOGITS, POSITIONS, Graph, Op
from llmctl.targets.cpu.abi import LANES, MAX_HEAD, QUERIES, TILE, TILE_BYTES, TILE_ROWS, WEIGHT_BITS, Kind
from llmctl.targets.cpu.adapted import AdaptedLinear, adapted_linears, sum_bytes
from llmctl.targets.cpu.layout import PackedLinear
from llmctl.targets.cpu.operands import Bound, IntOperand, Routing, Storage, View


class Lowering:
    """The first pass.

    Attributes:
        linears: packed weight by weight name. adapted: linears that adapters act on, by op name.
        routings: by the buffer of a choice's experts. in_order: by buffers whose rows are in expert order.
    """

    def __init__(self, graph: Graph, linears: Mapping[str, PackedLinear]) -> None:
        self.graph = graph
        self.linears = linears
        self.adapted = {found.built.name: found for found in adapted_linears(graph)}
        self.views: dict[str, View] = {}
        self.storages: list[Storage] = []
        self.bound: list[Bound] = []
        self.operands: dict[tuple[str, int, int, int], IntOperand] = {}
        self.halves: dict[str, Storage] = {}
        self.routings: dict[str, Routing] = {}
        self.in_order: dict[str, Routing] = {}
        self.on_rows = False

    def run(self) -> list[Bound]:
        """All bound ops, lifetimes filled in.

        Raises:
            UnsupportedModelError: an op the CPU runtime has no kernel for.
        """
        within = {op for found in self.adapted.values() for op in found.within}
        for op in self.graph.ops:
            if op.name in within:
                continue
            lower = LOWERINGS.get(op.kind)
            if lower is None:
                raise _refused(op.kind, REFUSED_KINDS.get(op.kind, "it is unknown"))
            if op.kind not in IN_EXPERT_ORDER and not self.in_order.keys().isdisjoint(op.inputs):
                raise _refused(op.kind, "its rows are in expert order")
            lower(self, op)
        # The ops on gathered rows run once for each chunk of rows: what they read of all tokens lives until the last.
        tail = next((i for i, bound in enumerate(self.bound) if bound.on_rows), len(self.bound))
        for storage in self.storages:
            if not storage.on_rows and storage.last >= tail:
                storage.last = len(self.bound) - 1
        return self.bound

    # storages

    def _storage(self, name: str, row_bytes: int, row_unit: int = 1) -> Storage:
        storage = Storage(name, row_bytes, self.on_rows, row_unit)
        self.storages.append(storage)
        return storage

    def _outputs(self, names: tuple[str, ...]) -> list[View]:
        """Views of new buffers that lie side by side in one matrix."""
        widths = [self.graph.buffers[n].width for n in names]
        storage = self._storage(names[0], 4 * sum(widths))
        views = []
        for i, name in enumerate(names):
            self.views[name] = View(storage, sum(widths[:i]), sum(widths))
            views.append(self.views[name])
        return views

    def _emit(self, bound: Bound) -> None:
        index = len(self.bound)
        used = [v.storage for v in bound.views.values()]
        for operand in bound.operands.values():
            used += operand.storages
        if bound.x16:
            used.append(bound.x16)
        if bound.routing:
            used += bound.routing.storages
        for storage in used:
            storage.first = index if storage.first < 0 else storage.first
            storage.last = index
        self.bound.append(bound)

    def _simple(self, kind: Kind, op: Op, inputs: tuple[str, ...], **extra: Any) -> Bound:
        """An op whose inputs are x, x2, … and whose outputs are y, y2."""
        views = {name: self.views[b] for name, b in zip(("x", "x2", "x3"), inputs, strict=False)}
        for name, output in zip(("y", "y2"), op.outputs, strict=False):
            views[name] = self._outputs((output,))[0]
        return Bound(kind, op, self.on_rows, views, **extra)

    # plain ops

    def _embed(self, op: Op) -> None:
        assert op.inputs == (INPUT_IDS,)
        self._emit(self._simple(Kind.EMBED, op, ()))

    def _pos_embed(self, op: Op) -> None:
        assert op.inputs[1] == POSITIONS
        self._emit(self._simple(Kind.POS_EMBED, op, op.inputs[:1]))

    def _attention(self, op: Op) -> None:
        if int(op.attrs["head_dim"]) > MAX_HEAD:
            raise UnsupportedModelError(
                f"heads of {op.attrs['head_dim']} columns: the CPU kernels take up to {MAX_HEAD}",
                fix="--target reference",
            )
        bound = Bound(Kind.ATTENTION, op, self.on_rows, {"x": self.views[op.inputs[0]]})
        group = int(op.attrs["heads"]) // int(op.attrs["kv_heads"])
        # A query tile makes all heads of a group, or QUERIES of them when the group has more.
        whole = group <= QUERIES or group % QUERIES == 0
        per_tile = min(group, QUERIES) * int(op.attrs["head_dim"]) if whole else 0
        self._result(bound, op.outputs, self._direct_columns(op.outputs, per_tile))
        self._emit(bound)

    def _gather_rows(self, op: Op) -> None:
        self.on_rows = True
        self._emit(self._simple(Kind.GATHER_ROWS, op, op.inputs))

    # norms

    def _norm(self, kind: Kind, op: Op) -> None:
        bound = Bound(kind, op, self.on_rows, {"x": self.views[op.inputs[0]]})
        if len(op.inputs) == 2:
            bound.views["x2"] = self.views[op.inputs[1]]
            bound.views["y2"] = self._outputs(op.outputs[1:])[0]
        self._result(bound, op.outputs[:1], self._direct_operand(op.outputs[0]))
        self._emit(bound)

    def _result(self, bound: Bound, outputs: tuple[str, ...], direct: PackedLinear | None) -> None:
        """What an op makes: as the int8 operand of ``direct``, as floats if that is None."""
        if direct is not None:
            bound.operands["y8"] = self._int_operand(outputs[0], direct)
        else:
            bound.views["y"] = self._outputs(outputs)[0]

    def _direct_operand(self, buffer: str) -> PackedLinear | None:
        """The weight whose int8 operand the op before it may write itself: when all linears that read it want that same
        operand, and no other op reads it but their adapters."""
        direct = [w for w in self._readers(buffer) if w.integer and w.permutation is None]
        if not direct or len(direct) != sum(op.kind != "lora" for op in self.graph.consumers(buffer)):
            return None
        return direct[0] if len({(w.columns, w.act_group) for w in direct}) == 1 else None

    def _readers(self, buffer: str) -> list[PackedLinear]:
        """The weights of the linears that read a buffer."""
        return [self.linears[op.weights[0]] for op in self.graph.consumers(buffer) if op.kind == "linear"]

    # rotary embedding

    def _rope(self, op: Op) -> None:
        self._emit(self._simple(Kind.ROPE, op, op.inputs[:2]))

    def _rope_kv_write(self, op: Op) -> None:
        q, k, v = (self.views[b] for b in op.inputs[:3])
        # q and k are rotated where they lie when nobody else reads them.
        y = q if len(self.graph.consumers(op.inputs[0])) == 1 else self._outputs(op.outputs)[0]
        width = self.graph.buffers[op.inputs[1]].width
        alone = len(self.graph.consumers(op.inputs[1])) == 1
        y2 = k if alone else View(self._storage(f"{op.name}.k", 4 * width), 0, width)
        self.views[op.outputs[0]] = y
        self._emit(Bound(Kind.ROPE, op, self.on_rows, {"x": q, "x2": k, "x3": v, "y": y, "y2": y2}))

    # linears

    def _linear(self, op: Op) -> None:
        for variant in sorted(REFUSED_VARIANTS.keys() & op.attrs.keys()):
            raise _refused(f"linear with {variant}", REFUSED_VARIANTS[variant])
        adapted = self.adapted.get(op.name)
        op = adapted.built if adapted else op
        packed, source = self.linears[op.weights[0]], op.inputs[0]
        bound = Bound(Kind.LINEAR, op, self.on_rows, packed=packed)
        if packed.integer:
            bound.operands["x8"] = self._quantized(op, source, packed)
        elif packed.dtype == "bf16":
            bound.x16 = self._half(op, source, packed)
        else:
            bound.views["x"] = self.views[source]
        if adapted:
            self._adapt(bound, adapted)
        per_tile = LANES if op.attrs.get("epilogue") else TILE
        self._result(bound, op.outputs, self._direct_columns(op.outputs, per_tile, many=True))
        self._emit(bound)
        if {"scale", "softcap"} & op.attrs.keys():
            y = bound.views["y"]
            self._emit(Bound(Kind.CAP, op, self.on_rows, {"x": y, "y": y}))

    # adapters

    def _adapt(self, bound: Bound, adapted: AdaptedLinear) -> None:
        """What adapters need beside a linear's own operands: room for their sums; its input as floats, unless it is an
        int8 operand, which they read, too."""
        if adapted.shared:
            raise _refused("lora", "what it adds to is read by another op, too")
        if {"scale", "softcap"} & bound.op.attrs.keys():
            raise _refused("lora", "its linear's result is scaled")
        bound.places, source = adapted.places, bound.op.inputs[0]
        if "x8" in bound.operands:
            operand = bound.operands["x8"]
            size = sum_bytes(operand.columns, operand.group, adapted.places)
        else:
            bound.views["x"] = self.views[source]
            size = sum_bytes(self.graph.buffers[source].width, 2, adapted.places)
        bound.views["low"] = View(self._storage(f"{bound.op.name}.low", size), 0, size // 4)

    def _apart(self, op: Op) -> None:
        """Adapters, and the gating that they leave behind them, are part of a linear."""
        raise _refused(op.kind, "it does not follow a linear")

    def _direct_columns(self, outputs: tuple[str, ...], per_tile: int, *, many: bool = False) -> PackedLinear | None:
        """As ``_direct_operand``, where an activation group is made whole in one place: inside the ``per_tile`` columns
        that a kernel makes at once, or (``many``) by several such tiles."""
        direct = self._direct_operand(outputs[0]) if len(outputs) == 1 else None
        if direct is None or direct.columns != self.graph.buffers[outputs[0]].width or not per_tile:
            return None
        whole = direct.act_group % per_tile == 0 if many else per_tile % direct.act_group == 0
        return direct if whole else None

    def _int_operand(self, buffer: str, packed: PackedLinear, rows: int = 1, *, grouped: bool = False) -> IntOperand:
        """``rows``: of the operand, a token. ``grouped``: in expert order."""
        key = (buffer, packed.columns, packed.act_group, 0 if packed.permutation is None else id(packed))
        if key not in self.operands:
            groups = packed.columns // packed.act_group
            self.operands[key] = IntOperand(
                self._storage(f"{buffer}.codes", rows * groups * act_group_bytes(packed.act_group), TILE_ROWS),
                self._storage(f"{buffer}.scales", 4 * rows * groups, TILE_ROWS),
                self._storage(f"{buffer}.sums", 4 * rows * groups, TILE_ROWS),
                packed.columns,
                packed.act_group,
                all(WEIGHT_BITS[w.dtype] == 8 for w in self._readers(buffer) or [packed] if w.integer),
                grouped,
            )
        return self.operands[key]

    def _quantized(self, op: Op, buffer: str, packed: PackedLinear) -> IntOperand:
        known = len(self.operands)
        operand = self._int_operand(buffer, packed)
        if len(self.operands) > known:
            views = {"x": self.views[buffer]}
            self._emit(
                Bound(Kind.QUANTIZE, op, self.on_rows, views, operands={"y8": operand}, permutation=packed.permutation)
            )
        return operand

    def _half(self, op: Op, buffer: str, packed: PackedLinear) -> Storage:
        if buffer not in self.halves:
            self.halves[buffer] = self._storage(f"{buffer}.bf16", 2 * packed.columns)
            views = {"x": self.views[buffer]}
            self._emit(Bound(Kind.TO_BF16, op, self.on_rows, views, packed=packed, x16=self.halves[buffer]))
        return self.halves[buffer]

    # experts

    def _route(self, op: Op) -> None:
        (logits,), (experts, shares) = op.inputs, op.outputs
        top_k, count = int(op.attrs["top_k"]), self.graph.buffers[logits].width
        chosen, order, place = (self._storage(f"{experts}{suffix}", 4 * top_k) for suffix in ("", ".order", ".place"))
        self.routings[experts] = routing = Routing(chosen, order, place, count, op.attrs)
        views = {"x": self.views[logits], "y": self._outputs((shares,))[0]}
        self._emit(Bound(Kind.ROUTE, op, self.on_rows, views, routing=routing))
        self._emit(Bound(Kind.SORT_ROWS, op, self.on_rows, routing=routing))

    def _elementwise(self, kind: Kind, op: Op) -> None:
        """Of rows in expert order, the result is, too."""
        self._emit(self._simple(kind, op, op.inputs))
        orders = {name: self.in_order[name] for name in op.inputs if name in self.in_order}
        if orders and len(orders) != len(set(op.inputs)):
            raise _refused(op.kind, "some of its rows are in expert order")
        self.in_order |= dict.fromkeys(op.outputs, next(iter(orders.values()))) if orders else {}

    def _grouped_linear(self, op: Op) -> None:
        x, experts = op.inputs
        packed, routing, ordered = self.linears[op.weights[0]], self.routings[experts], x in self.in_order
        if ordered and self.in_order[x] is not routing:
            raise _refused(op.kind, "its rows are in the order of other experts")
        bound = Bound(Kind.GROUPED_LINEAR, op, self.on_rows, packed=packed, routing=routing)
        if packed.integer:
            bound.operands["x8"] = self._gathered_int(op, x, packed, routing)
        elif packed.dtype == "bf16":
            bound.x16 = self._gathered_half(op, x, packed, routing)
        else:
            bound.views["x"] = self.views[x] if ordered else self._gathered_float(op, x, packed, routing)
        (y,) = op.outputs
        direct = self._direct_rows(op)
        if direct is not None:
            bound.operands["y8"] = self._int_operand(y, direct, routing.top_k, grouped=True)
        else:
            bound.views["y"] = self._outputs((y,))[0]
        self.in_order[y] = routing
        self._emit(bound)

    def _weighted_sum(self, op: Op) -> None:
        self._emit(self._simple(Kind.WEIGHTED_SUM, op, op.inputs, routing=self.in_order.get(op.inputs[0])))

    def _direct_rows(self, op: Op) -> PackedLinear | None:
        """As ``_direct_operand``, of the rows that a grouped linear makes: for one reader, of whole groups of tiles."""
        consumers = self.graph.consumers(op.outputs[0])
        if len(consumers) != 1 or consumers[0].kind != "grouped_linear" or consumers[0].inputs[1] != op.inputs[1]:
            return None
        packed, chosen = self.linears[consumers[0].weights[0]], self.routings[op.inputs[1]].top_k
        per_tile = LANES if "epilogue" in op.attrs else TILE
        whole = packed.columns == self.graph.buffers[op.outputs[0]].width // chosen
        return packed if packed.integer and whole and packed.act_group % per_tile == 0 else None

    def _gather(self, op: Op, x: str, packed: PackedLinear, routing: Routing, **operand: Any) -> None:
        """What a grouped linear reads, made of x: rows in expert order."""
        views = {"x": self.views[x], **operand.pop("views", {})}
        kind, ordered = Kind.GATHER_EXPERTS, x in self.in_order
        self._emit(Bound(kind, op, self.on_rows, views, packed, routing=routing, sorted=ordered, **operand))

    def _gathered_int(self, op: Op, x: str, packed: PackedLinear, routing: Routing) -> IntOperand:
        known = len(self.operands)
        buffer = x if x in self.in_order else f"{x}@{routing.experts.name}"
        operand = self._int_operand(buffer, packed, routing.top_k, grouped=True)
        if len(self.operands) > known:
            self._gather(op, x, packed, routing, operands={"y8": operand})
        return operand

    def _gathered_half(self, op: Op, x: str, packed: PackedLinear, routing: Routing) -> Storage:
        buffer = f"{x}@{routing.experts.name}"
        if buffer not in self.halves:
            self.halves[buffer] = self._storage(f"{buffer}.bf16", 2 * routing.top_k * packed.columns)
            self._gather(op, x, packed, routing, x16=self.halves[buffer])
        return self.halves[buffer]

    def _gathered_float(self, op: Op, x: str, packed: PackedLinear, routing: Routing) -> View:
        buffer = f"{x}@{routing.experts.name}"
        if buffer not in self.views:
            width = routing.top_k * packed.columns
            self.views[buffer] = View(self._storage(buffer, 4 * width), 0, width)
            self._gather(op, x, packed, routing, views={"y": self.views[buffer]})
        return self.views[buffer]


def _as(kind: Kind) -> Callable[[Lowering, Op], None]:
    """The lowering to one native op that reads all inputs and writes all outputs."""
    return lambda lowering, op: lowering._emit(lowering._simple(kind, op, op.inputs))


LOWERINGS: Mapping[str, Callable[[Lowering, Op], None]] = {
    "embed": Lowering._embed,
    "pos_embed": Lowering._pos_embed,
    "rms_norm": lambda lowering, op: lowering._norm(Kind.RMS_NORM, op),
    "layer_norm": lambda lowering, op: lowering._norm(Kind.LAYER_NORM, op),
    "head_rms_norm": _as(Kind.HEAD_RMS_NORM),
    "linear": Lowering._linear,
    "route": Lowering._route,
    "grouped_linear": Lowering._grouped_linear,
    "weighted_sum": Lowering._weighted_sum,
    "act": lambda lowering, op: lowering._elementwise(Kind.ACT, op),
    "mul": lambda lowering, op: lowering._elementwise(Kind.MUL, op),
    "add": _as(Kind.ADD),
    "rope": Lowering._rope,
    "kv_write": _as(Kind.KV_WRITE),
    "attention": Lowering._attention,
    "gather_rows": Lowering._gather_rows,
    "add_rms_norm": lambda lowering, op: lowering._norm(Kind.RMS_NORM, op),
    "add_layer_norm": lambda lowering, op: lowering._norm(Kind.LAYER_NORM, op),
    "rope_kv_write": Lowering._rope_kv_write,
    "act_mul": Lowering._apart,
    "lora": Lowering._apart,
}
"""By op kind."""

IN_EXPERT_ORDER = frozenset({"grouped_linear", "weighted_sum", "act", "mul"})
"""Kinds that take rows in expert order: a token's rows are then apart."""

_OWN_ROWS = "quantized linears take int8 rows by themselves, with a scale for every group of columns"
REFUSED_KINDS: Mapping[str, str] = {
    "quantize": _OWN_ROWS,
    "rms_norm_s8": _OWN_ROWS,
    "layer_norm_s8": _OWN_ROWS,
    "add_rms_norm_s8": _OWN_ROWS,
    "add_layer_norm_s8": _OWN_ROWS,
    "act_mul_s8": _OWN_ROWS,
}
"""Op kind -> why there is no kernel for it."""
REFUSED_VARIANTS: Mapping[str, str] = {
    "activations": _OWN_ROWS,
    "residual": "a residual is added by the norm that follows",
}
"""Attribute of a linear -> why there is no kernel for linears that have it."""


def _refused(what: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"op '{what}' has no native CPU kernel: {reason}", fix="--target reference")


def act_group_bytes(group: int) -> int:
    """Room for a row's codes of one activation group: in tiles they are one row of a tile, or of two equally wide."""
    return group if group <= TILE_BYTES else -(-group // 8) * 8


def logits_view(lowering: Lowering) -> View:
    """Where the last op leaves its logits."""
    return lowering.views[LOGITS]


def hidden_view(lowering: Lowering) -> View:
    """Where the hidden states of all tokens lie from the final norm to the end of the step: the ops on gathered rows,
    which read them, may run several times."""
    graph = lowering.graph
    return lowering.views[graph.ops[graph.gather_index()].inputs[0]]
