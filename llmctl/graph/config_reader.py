"""Typed access to an HF ``config.json`` under a family's spellings and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmctl.errors import CheckpointError, UnsupportedModelError
from llmctl.graph.config_keys import NEUTRAL
from llmctl.graph.family import Family, Switch

_LARGEST = 1e6  # factor that a model may have; its inverse is the smallest

# Keys that say nothing about the forward pass of a causal language model at inference, or (as ``pretraining_tp``, by
# which sums were cut) nothing that changes its result. A family may read one of them all the same.
_METADATA = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern architectures
    attention_dropout attention_probs_dropout_prob attention_softmax_in_fp32 attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout
    compression_config cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop embedding_dropout encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout hidden_dropout_prob id2label initializer_range is_decoder is_llama_config label2id length_penalty
    max_length max_window_layers min_length model_max_length model_type n_ctx no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_router_logits
    output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads quantization_config
    remove_invalid_values reorder_and_upcast_attn repetition_penalty resid_pdrop residual_dropout return_dict
    return_dict_in_generate router_aux_loss_coef router_jitter_noise scale_attention_softmax_in_fp32 sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers.js_config transformers_version typical_p use_bfloat16 use_cache use_embedding_sharing
    use_parallel_embedding use_return_dict""".split()
)


class ConfigReader:
    """One config read as one family's; remembers which keys were read.

    Attributes:
        seen: those, in either spelling.
    """

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.family = family
        self.seen: set[str] = set()

    def value(self, key: str, default: Any = None) -> Any:
        """Of a canonical key, in the family's spelling or its own; where it is absent the family's default, else
        ``default``."""
        own, name, defaults = self.family.keys.get(key, key), self._name(key), self.family.defaults
        self.seen |= {own, key}
        return self.config[name] if name in self.config else defaults.get(own, defaults.get(key, default))

    def _name(self, key: str) -> str:
        """The spelling in which config.json has a canonical key; the family's, if it has that or neither."""
        own = self.family.keys.get(key, key)
        return key if own not in self.config and key in self.config else own

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer.

        Raises:
            CheckpointError: something else, or nothing and no default.
        """
        value = self.value(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"config.json: {self._name(key)} must be a positive integer, found {value!r}")
        return value

    def number(self, key: str) -> float:
        """A number.

        Raises:
            CheckpointError: something else, or nothing.
        """
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"config.json: {key} must be a number, found {value!r}")
        return float(value)

    def factor(self, key: str) -> float:
        """What something is multiplied by: 1 where the family does not honour the key (see ``Family.factors``).

        Raises:
            CheckpointError: no number, or one that no model has.
        """
        if key not in self.family.factors:
            return 1.0
        value = self.value(key)
        return 1.0 if value is None else self._positive(key, value)

    def cap(self, key: str) -> float:
        """A soft cap, 0 where there is none; raises as ``factor``."""
        value = self.value(key) if key in self.family.factors else None
        return 0.0 if value is None or value is False else self._positive(key, value)

    def _positive(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 1 / _LARGEST <= value <= _LARGEST:
            raise CheckpointError(
                f"config.json: {key} must be a number between {1 / _LARGEST:g} and {_LARGEST:g}, found {value!r}"
            )
        return float(value)

    def switch(self, switch: Switch) -> bool:
        """A fact of the family, or what config.json decides."""
        return bool(self.value(switch, False)) if isinstance(switch, str) else switch

    def check_rest(self) -> list[str]:
        """Refuse every forward-pass key that was not read and is not neutral; the keys of which nothing is known.

        Raises:
            UnsupportedModelError: naming the key.
        """
        rules = {**NEUTRAL, "partial_rotary_factor": (None, 1, 1.0), **self.family.neutral}
        for key, allowed in rules.items():
            if key in self.config and (key not in self.seen or key in self.family.neutral):
                value = self.config[key]
                if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
                    raise UnsupportedModelError(
                        f"config.json: {key}={value!r} is not supported for family '{self.family.name}'"
                    )
        return sorted(k for k in self.config if k not in self.seen and k not in rules and k not in _METADATA)
