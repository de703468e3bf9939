"""Every tensor of a checkpoint accounted for: used by the Graph, known to be superfluous, or refused with the reason.

One table of rules, tried in order; the first that fits a tensor decides. They look at names and shapes; contents are
read only of biases, which may be all zeros. Tensors of formats that a reader understands never come here: a
``Checkpoint`` lists them as the one weight that they make up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from llmctl.checkpoint.hf_folder import quantization_config
from llmctl.checkpoint.methods import FROM_16, REFUSED
from llmctl.checkpoint.quantized import QuantizedWeight
from llmctl.checkpoint.tensor_info import TensorInfo
from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.dtypes import BY_SAFETENSORS, FLOAT_DTYPES
from llmctl.graph.graph import Graph

_SHOWN = 3  # names in a message


class Contents(Protocol):
    """What is asked of a ``checkpoint.reader.Checkpoint``."""

    path: Any
    config: dict[str, Any]
    outside: frozenset[str]

    def names(self) -> list[str]: ...

    def has(self, name: str) -> bool: ...

    def describe(self, name: str) -> TensorInfo: ...

    def weight(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Unused:
    """Tensors that are known to be superfluous.

    Attributes:
        reason: why nothing reads them. names: sorted.
        notable: they hold something that a user may have wanted.
    """

    reason: str
    names: tuple[str, ...]
    notable: bool = False


@dataclass(frozen=True)
class _Tensor:
    """A tensor that is asked about; ``graph``: what uses the others, None before there is one."""

    name: str
    checkpoint: Contents
    graph: Graph | None = None

    @property
    def info(self) -> TensorInfo:
        return self.checkpoint.describe(self.name)

    @property
    def layer(self) -> int | None:
        found = re.match(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)\.", self.name)
        return None if found is None else int(found[1])

    def count(self, key: str) -> int | None:
        """A number of config.json; None: there is none."""
        found = self.checkpoint.config.get(key)
        return found if isinstance(found, int) else None


@dataclass(frozen=True)
class _Rule:
    """Tensors of one kind.

    Attributes:
        reason: what they are; of superfluous ones, why.
        pattern: searched for in the name. also: what must hold besides.
        superfluous: nothing is lost without them, else they are refused. notable: as ``Unused`` has it.
        foreign: refused for their format, which can be told before there is a Graph.
        fix: what a user can do.
    """

    reason: str
    pattern: str = ""
    also: Callable[[_Tensor], bool] = lambda _: True
    superfluous: bool = False
    notable: bool = False
    foreign: bool = False
    fix: str = "check that config.json belongs to these weights"

    def fits(self, tensor: _Tensor) -> bool:
        return re.search(self.pattern, tensor.name) is not None and self.also(tensor)


def _is_predictor(tensor: _Tensor) -> bool:
    """DeepSeek's layers after the last, by vLLM's rule."""
    layers, more, layer = tensor.count("num_hidden_layers"), tensor.count("num_nextn_predict_layers"), tensor.layer
    return layers is not None and more is not None and layer is not None and layers <= layer < layers + more


def _is_beyond(tensor: _Tensor) -> bool:
    return tensor.graph is not None and tensor.layer is not None and tensor.layer >= tensor.graph.num_layers


def _is_mask(tensor: _Tensor) -> bool:
    axes = len(tensor.info.shape)
    return axes <= 1 if tensor.name.endswith("masked_bias") else axes == 4


def _is_tied(tensor: _Tensor) -> bool:
    return tensor.graph is not None and "lm_head.weight" not in tensor.graph.weights


def _is_zero(tensor: _Tensor) -> bool:
    found = tensor.checkpoint.weight(tensor.name)
    return not isinstance(found, QuantizedWeight) and not bool((found != 0).any())


def _has_weight(tensor: _Tensor) -> bool:
    return tensor.checkpoint.has(_weight_beside(tensor))


def _is_of_quantized(tensor: _Tensor) -> bool:
    return _has_weight(tensor) and tensor.checkpoint.describe(_weight_beside(tensor)).quant is not None


def _weight_beside(tensor: _Tensor) -> str:
    return f"{tensor.name.rpartition('.')[0]}.weight"


_MERGE = "merge the adapter into its base model first: llmctl merge BASE ADAPTER --output DIR"


def _foreign(reason: str, pattern: str, also: Callable[[_Tensor], bool] = lambda _: True, fix: str = FROM_16) -> _Rule:
    return _Rule(reason, pattern, also, foreign=True, fix=fix)


def _method(name: str, pattern: str, also: Callable[[_Tensor], bool] = lambda _: True) -> _Rule:
    """A method that ``methods.py`` refuses by its name, in a checkpoint that does not name it."""
    what, instead = REFUSED[name]
    return _foreign(what, pattern, also, instead)


def _superfluous(
    reason: str, pattern: str = "", also: Callable[[_Tensor], bool] = lambda _: True, notable: bool = False
) -> _Rule:
    return _Rule(reason, pattern, also, superfluous=True, notable=notable)


RULES: tuple[_Rule, ...] = (
    _superfluous(
        "not of the text model: images and sound are not read",
        also=lambda t: t.name in t.checkpoint.outside,
        notable=True,
    ),
    _superfluous("multi-token prediction: drafts tokens, which the model itself also writes", r"(^|\.)mtp[._]",
                 notable=True),
    _superfluous("multi-token prediction: drafts tokens, which the model itself also writes", also=_is_predictor,
                 notable=True),
    _superfluous("rotary frequencies: config.json gives them",
                 r"\b(rotary_emb|rotary_pos_emb|rotary)\.((original_)?inv_freq|cos_cached|sin_cached)$|^rope\.freqs$"),
    _superfluous("causal mask", r"\.(attn|attention)\.(bias|masked_bias)$", _is_mask),
    _superfluous("positions counted from 0", r"(^|\.)position_ids$"),
    _superfluous("scales of a quantized KV cache, which has its own here", r"\.(k|v|q|prob|kv)_scale$"),
    _superfluous("scales of activations, which an engine scales by what it sees",
                 r"\.(input|output)_(scale|zero_point)$", _is_of_quantized),
    _foreign("an adapter's weights, not a model's",
             r"\.(lora_([ABE]|embedding_[AB]|magnitude_vector)|ia3_l|base_layer|modules_to_save)\b|^base_model\.",
             fix=_MERGE),
    _foreign("scales of bitsandbytes' weights that are not as it writes them, or without its settings",
             r"\.(absmax|(nested_)?quant_map|nested_absmax|SCB|weight_format)$|\.quant_state\."),
    _method("mlx", r"\.(scales|biases)$", _has_weight),
    _method("exl2", r"\.q_(weight|scale|scale_max|groups|invperm|perm)$"),
    _method("exl3", r"\.(trellis|su[hv]?|svh)$"),
    _method("aqlm", r"\.(codes|codebooks)$"),
    _method("hqq", r"\.(W_q|meta)$"),
    _method("mxfp4", r"_(blocks|scales)$"),
    _foreign("scales or codes of weights quantized in a way that is not read",
             r"\.(weight|input|output|act|activation|pre_quant)_(scales?|scale_inv|scale_2|zero_point|global_scale)$"
             r"|\._?weight_(packed|shape|g_idx|qdata|scale|zero_point)$"
             r"|\.(scales?|scale_inv|zeros|zero_point|qweight|qzeros|g_idx)$"),
    _Rule("layers beyond num_hidden_layers", also=_is_beyond),
    _superfluous("the head is tied to the embeddings, which it equals", r"^(lm_head|embed_out)\.weight$", _is_tied),
    _superfluous("all zeros", r"\.bias$", _is_zero),
    _Rule("biases that are not zero and that config.json does not declare", r"\.bias$"),
    _Rule("a head that is not a language model's", r"^(score|classifier|v_head|value_head|reward_head|qa_outputs)\."),
    _Rule("not read by this family"),
)  # fmt: skip
"""What a tensor that the Graph does not use can be."""


def refuse_foreign(checkpoint: Contents) -> None:
    """Refuse a checkpoint in a format that is not read, before a Graph would find its weights missing or misshapen.

    Raises:
        UnsupportedModelError: naming the format and the tensors.
    """
    rules = RULES[: 1 + max(i for i, rule in enumerate(RULES) if rule.foreign)]
    _refuse(checkpoint, _sorted_out((_Tensor(name, checkpoint) for name in checkpoint.names()), rules))


def account(checkpoint: Contents, graph: Graph) -> tuple[Unused, ...]:
    """The tensors that the Graph does not use, all of them known to be superfluous.

    Raises:
        CheckpointError: some are not, or a dense weight is made of integers or 8-bit floats; kinds and names are given.
        UnsupportedModelError: they belong to a format that is not read.
    """
    used = {part.tensor for weight in graph.weights.values() for part in weight.parts}
    _check_dense(checkpoint, graph)
    rest = (_Tensor(name, checkpoint, graph) for name in checkpoint.names() if name not in used)
    found = _sorted_out(rest, RULES)
    _refuse(checkpoint, found)
    by_reason: dict[str, list[str]] = {}
    for rule, names in found.items():
        by_reason.setdefault(rule.reason, []).extend(names)
    notable = {rule.reason for rule in found if rule.notable}
    return tuple(Unused(reason, tuple(sorted(names)), reason in notable) for reason, names in by_reason.items())


def name_some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more


def _sorted_out(tensors: Iterable[_Tensor], rules: tuple[_Rule, ...]) -> dict[_Rule, list[str]]:
    """Names by the rule that fits, in the rules' order; those that none fits are left out."""
    found: dict[_Rule, list[str]] = {rule: [] for rule in rules}
    for tensor in tensors:
        rule = next((rule for rule in rules if rule.fits(tensor)), None)
        if rule is not None:
            found[rule].append(tensor.name)
    return {rule: names for rule, names in found.items() if names}


def _refuse(checkpoint: Contents, found: Mapping[_Rule, list[str]]) -> None:
    refused = {rule: names for rule, names in found.items() if not rule.superfluous}
    if not refused:
        return
    first = next(iter(refused))
    said = "; ".join(f"{rule.reason}: {name_some(names)}" for rule, names in refused.items())
    kind = UnsupportedModelError if first.foreign else CheckpointError
    where = f" ({_where_settings_stand(checkpoint)})" if first.foreign and first.fix != _MERGE else ""
    raise kind(f"{checkpoint.path}: tensors that would be left out: {said}{where}", fix=first.fix)


def _check_dense(checkpoint: Contents, graph: Graph) -> None:
    """Refuse numbers that mean something only with scales, of which there are none."""
    odd: dict[str, str] = {}
    for weight in graph.weights.values():
        if weight.quant is None:
            stored = {part.tensor: checkpoint.describe(part.tensor).dtype for part in weight.parts}
            odd |= {n: code for n, code in stored.items() if BY_SAFETENSORS[code].name not in FLOAT_DTYPES}
    if odd:
        dtypes = ", ".join(sorted(set(odd.values())))
        raise UnsupportedModelError(
            f"{checkpoint.path}: weights of dtype {dtypes} without a scheme ({_where_settings_stand(checkpoint)}): "
            f"{name_some(odd)}",
            fix=FROM_16,
        )


def _where_settings_stand(checkpoint: Contents) -> str:
    """Where a checkpoint says how it is quantized."""
    found = quantization_config(checkpoint.path, checkpoint.config)
    return f"its settings: {found[1]}" if found else "no quantization_config says how"
