"""Tiny checkpoints in other tools' quantized formats, with the weights that each format's owner defines them to be.

Every maker quantizes a dense weight [N, K] and returns the module's stored tensors by suffix and its dequantised weight
in float32, computed from the stored tensors by the owner's definition and by nothing of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_checkpoint
import torch
from tiny_checkpoint import HEADS, KV_HEADS, LAYERS, VOCAB
from torch import Tensor

from llmctl.checkpoint.nested import usual_values
from llmctl.checkpoint.safetensors_io import tensor_spec, write_safetensors
from llmctl.graph.code_books import CODE_BOOKS

HIDDEN, MLP = 256, 512
Made = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One format: how a linear is written, and what config.json (or another file) says."""

    make: Callable[[Tensor], Made]
    config: Mapping[str, Any]
    file: str = "config.json"
    key: str = "quantization_config"


def linear_shapes() -> dict[str, tuple[int, int]]:
    """(N, K) of every linear in the layers, by module name."""
    return tiny_checkpoint.linear_shapes(HIDDEN, MLP)


def model_config() -> dict[str, Any]:
    """Its config.json, without quantization."""
    return tiny_checkpoint.config(
        hidden_size=HIDDEN, intermediate_size=MLP, max_position_embeddings=256, dtype="bfloat16", eos_token_id=2
    )


def write_pair(root: Path, fmt: Format) -> tuple[Path, Path, int]:
    """A quantized checkpoint, the dense float32 one of what its weights are, and the bytes of its quantized modules."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 16

    plain = {name: torch.ones(HIDDEN) for name in _norms()}
    plain |= {name: random(VOCAB, HIDDEN).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    quantized, dense, size = dict(plain), {name: tensor.float() for name, tensor in plain.items()}, 0
    for name, shape in linear_shapes().items():
        planes, weight = fmt.make(random(*shape))
        quantized |= {f"{name}.{suffix}": plane for suffix, plane in planes.items()}
        dense[f"{name}.weight"] = weight
        size += sum(plane.nbytes for suffix, plane in planes.items() if suffix != "input_scale")
    here = model_config() | ({fmt.key: fmt.config} if fmt.file == "config.json" else {})
    paths = _write(root / "quantized", here, quantized), _write(root / "dense", model_config(), dense)
    if fmt.file != "config.json":
        (paths[0] / fmt.file).write_text(json.dumps(fmt.config))
    return *paths, size


def write_gguf_pair(root: Path, name: str) -> tuple[Path, Path, int]:
    """As ``write_pair``, with every matrix, the (tied) embedding too, in a ggml type.

    What they are, the ``gguf`` package says.
    """
    import gguf

    qtype, rng = gguf.GGMLQuantizationType[name], np.random.default_rng(4)
    root.mkdir(parents=True)
    writer = gguf.GGUFWriter(str(root / "quantized.gguf"), "qwen2")
    for key, value in {
        "block_count": LAYERS, "context_length": 256, "embedding_length": HIDDEN, "feed_forward_length": MLP,
        "head_count": HEADS, "head_count_kv": KV_HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "tokenizer_model": "gpt2", "tokenizer_pre": "qwen2", "token_merges": ["t 1"], "eos_token_id": 2,
        "token_list": ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(VOCAB - 3))], "token_types": [1] * VOCAB,
    }.items():  # fmt: skip
        getattr(writer, f"add_{key}")(value)
    dense = {name: torch.ones(HIDDEN) for name in _norms()}
    kv = HIDDEN // HEADS * KV_HEADS
    for i in range(LAYERS):
        dense |= {f"model.layers.{i}.self_attn.{p}_proj.bias": torch.zeros(n) for p, n in
                  (("q", HIDDEN), ("k", kv), ("v", kv))}  # fmt: skip
    for tensor, values in dense.items():
        writer.add_tensor(_gguf_name(tensor), values.numpy())
    size = 0
    matrices = {**{f"{m}.weight": s for m, s in linear_shapes().items()}, "model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for tensor, shape in matrices.items():
        raw = _blocks(rng.standard_normal(shape).astype(np.float32) / 16, qtype, rng)
        writer.add_tensor(_gguf_name(tensor), raw, raw_dtype=qtype)
        dense[tensor] = torch.from_numpy(gguf.quants.dequantize(raw, qtype).astype(np.float32))
        size += raw.nbytes
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    config = {**model_config(), "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    config |= {"tie_word_embeddings": True, "use_sliding_window": False}
    return root / "quantized.gguf", _write(root / "dense", config, dense), size


def _blocks(weight: np.ndarray, qtype: Any, rng: np.random.Generator) -> np.ndarray:
    """Stored blocks u8 [N, bytes]; of K types, which gguf only reads, random ones of about a weight's size."""
    import gguf

    columns, size = gguf.GGML_QUANT_SIZES[qtype]
    if not qtype.name.endswith("_K"):
        return np.asarray(gguf.quants.quantize(weight, qtype))
    raw = rng.integers(0, 256, (weight.size // columns, size), dtype=np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[qtype.name]
    top = {"Q2_K": 3 * 15, "Q3_K": 4 * 32, "Q4_K": 15 * 63, "Q5_K": 31 * 63, "Q6_K": 32 * 128}[qtype.name]
    for i, start in enumerate(
        at
    ):  # a minimum is at most half of the range, so that weights are about as often negative
        most = 0.2 / top if i == 0 else 0.1 / (15 if qtype.name == "Q2_K" else 63)
        scales = (rng.uniform(0.5, 1, len(raw)) * most).astype(np.float16)
        raw[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(len(weight), -1)


def _gguf_name(name: str) -> str:
    short = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.norm": "output_norm", "model.embed_tokens": "token_embd",
    }  # fmt: skip
    name = name.replace("model.layers.", "blk.")
    for theirs, ours in short.items():
        name = name.replace(theirs, ours)
    return name


def _norms() -> list[str]:
    layers = (f"model.layers.{i}.{n}" for i in range(LAYERS) for n in ("input_layernorm", "post_attention_layernorm"))
    return ["model.norm.weight", *(f"{name}.weight" for name in layers)]


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokens = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(VOCAB - 3))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    specs = {name: tensor_spec(tensor.contiguous()) for name, tensor in tensors.items()}
    write_safetensors(folder / "model.safetensors", specs)
    return folder


# compressed-tensors


def _grid(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Signed codes int8 [N, K], scales bfloat16 [N, G], zero points int8 [N, G], each group rounded to nearest."""
    parts = weight.reshape(len(weight), -1, group)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scales = (parts.abs().amax(2) / high).bfloat16()
        zeros = torch.zeros(scales.shape)
    else:
        scales = ((parts.amax(2) - parts.amin(2)) / (high - low)).bfloat16()
        zeros = (low - parts.amin(2) / scales.float()).round().clamp(low, high)
    codes = (parts / scales.float()[..., None] + zeros[..., None]).round().clamp(low, high)
    return codes.reshape(weight.shape).to(torch.int8), scales, zeros.to(torch.int8)


def _dequantized(codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """compressed_tensors' ``dequantize``, in float32."""
    group = codes.shape[1] // scales.shape[1]
    return (codes.float() - zeros.float().repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)


def _packed(values: Tensor, bits: int) -> Tensor:
    """compressed_tensors' ``pack_to_int32`` along the last axis."""
    lanes = (values.long() + (1 << (bits - 1))).unflatten(-1, (-1, 32 // bits))
    words = sum(lanes[..., i] << (bits * i) for i in range(32 // bits))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _pack_quantized(bits: int, group: int | None, symmetric: bool) -> Callable[[Tensor], Made]:
    def make(weight: Tensor) -> Made:
        codes, scales, zeros = _grid(weight, bits, group or weight.shape[1], symmetric)
        planes = {
            "weight_packed": _packed(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            planes["weight_zero_point"] = _packed(zeros.T, bits).T
        return planes, _dequantized(codes, scales, zeros)

    return make


def _int8(static: bool) -> Callable[[Tensor], Made]:
    def make(weight: Tensor) -> Made:
        codes, scales, zeros = _grid(weight, 8, weight.shape[1], True)
        planes = {"weight": codes, "weight_scale": scales}
        if static:
            planes["input_scale"] = torch.tensor([0.02])
        return planes, _dequantized(codes, scales, zeros)

    return make


def _groups(layout: str, weights: Mapping[str, Any], activations: Any = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": activations}
    return {
        "quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
        "ignore": ["lm_head"], "quantization_status": "compressed", **more,
    }  # fmt: skip


def _int(bits: int, group: int | None, symmetric: bool) -> dict[str, Any]:
    strategy = "group" if group else "channel"
    return {"type": "int", "num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": group}


# fp8


def _fp8(block: tuple[int, int] | None, scale_name: str, kind: torch.dtype = torch.float32) -> Callable[[Tensor], Made]:
    """``block`` None: one scale a tensor; (1, 0): one a row; else one a block."""

    def make(weight: Tensor) -> Made:
        rows, columns = weight.shape
        tall, wide = (rows, columns) if block is None else (block[0], block[1] or columns)
        index = (torch.arange(rows) // tall)[:, None] * -(-columns // wide) + torch.arange(columns) // wide
        most = torch.zeros(int(index.max()) + 1).scatter_reduce(0, index.flatten(), weight.abs().flatten(), "amax")
        scales = (most / 448).to(kind)
        codes = (weight / scales.float()[index]).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = scales.reshape(()) if block is None else scales.reshape(-(-rows // tall), -1)
        planes = {"weight": codes, scale_name: stored}
        if block is None:
            planes["input_scale"] = torch.tensor(0.02)
        return planes, codes.float() * scales.float()[index]

    return make


# bitsandbytes


def _bnb4(book: str, nested: bool) -> Callable[[Tensor], Made]:
    """``quantize_4bit`` in blocks of 64, and ``dequantize_4bit`` in float32.

    Tensors of bitsandbytes 0.50.2 (both books, doubly quantized or not) were read here once, bit for bit as it
    dequantizes them; names, dtypes, shapes and JSON are those that it wrote.
    """
    book_values = torch.tensor(CODE_BOOKS[book].values)

    def make(weight: Tensor) -> Made:
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        codes = (blocks[..., None] / absmax[:, None, None] - book_values).abs().argmin(2).to(torch.uint8).flatten()
        state: dict[str, Any] = {"quant_type": book, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
        planes = {"weight": (codes[::2] << 4 | codes[1::2])[:, None], "weight.quant_map": book_values}
        planes["weight.absmax"] = absmax
        if nested:
            offset, steps = float(absmax.mean()), usual_values()
            parts = (absmax - offset).split(256)
            largest = torch.stack([part.abs().max() for part in parts])
            small = torch.cat([(p[:, None] / m - steps).abs().argmin(1) for p, m in zip(parts, largest, strict=True)])
            planes |= {"weight.absmax": small.to(torch.uint8), "weight.nested_absmax": largest}
            planes["weight.nested_quant_map"] = steps
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
            absmax = steps[small] * largest[torch.arange(len(small)) // 256] + offset
        packed = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
        planes[f"weight.quant_state.bitsandbytes__{book}"] = packed
        return planes, (book_values[codes.int()].reshape(-1, 64) * absmax[:, None]).reshape(weight.shape)

    return make


def _bnb8(weight: Tensor) -> Made:
    """``int8_vectorwise_quant`` and ``int8_vectorwise_dequant``; as that of version 0.50.2."""
    scb = weight.abs().amax(1)
    codes = (weight * (127 / scb)[:, None]).round().to(torch.int8)
    planes = {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return planes, codes.float() * scb[:, None] * 7.874015718698502e-3


def _bnb_config(**changes: Any) -> dict[str, Any]:
    """As transformers writes it."""
    return {
        "quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "load_in_4bit": True,
        "load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_threshold": 6.0,
        **changes,
    }  # fmt: skip


_FLOAT = {"type": "float", "num_bits": 8, "symmetric": True}
FORMATS: dict[str, Format] = {
    "ct-w4-g128": Format(_pack_quantized(4, 128, True), _groups("pack-quantized", _int(4, 128, True))),
    "ct-w4-g32-asym": Format(
        _pack_quantized(4, 32, False), _groups("pack-quantized", _int(4, 32, False)), key="compression_config"
    ),
    "ct-w4-channel": Format(_pack_quantized(4, None, True), _groups("pack-quantized", _int(4, None, True))),
    "ct-w8a16": Format(_pack_quantized(8, 128, True), _groups("pack-quantized", _int(8, 128, True))),
    "ct-w8a8": Format(_int8(False), _groups("int-quantized", _int(8, None, True), {"dynamic": True, "num_bits": 8})),
    "ct-w8a8-static": Format(
        _int8(True), _groups("int-quantized", _int(8, None, True), {"dynamic": False, "num_bits": 8})
    ),
    "ct-fp8-channel": Format(
        _fp8((1, 0), "weight_scale", torch.bfloat16), _groups("float-quantized", {**_FLOAT, "strategy": "channel"})
    ),
    "ct-fp8-tensor": Format(_fp8(None, "weight_scale"), _groups("float-quantized", {**_FLOAT, "strategy": "tensor"})),
    "fp8-blocks": Format(
        _fp8((128, 128), "weight_scale_inv"),
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ),
    "modelopt-fp8": Format(
        _fp8(None, "weight_scale"),
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
        file="hf_quant_config.json",
    ),
    "bnb-nf4": Format(_bnb4("nf4", False), _bnb_config()),
    "bnb-nf4-double": Format(_bnb4("nf4", True), _bnb_config(bnb_4bit_use_double_quant=True)),
    "bnb-fp4": Format(_bnb4("fp4", False), _bnb_config(bnb_4bit_quant_type="fp4")),
    "bnb-int8": Format(_bnb8, _bnb_config(load_in_4bit=False, load_in_8bit=True)),
}
