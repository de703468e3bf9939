"""A Llama that follows scripts: each token of one is followed by the next, whatever came before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from fixtures import make_tiny_llama
from tokenizers import AddedToken, Tokenizer

HIDDEN = 128


def make_scripted_llama(folder: Path, scripts: Sequence[Sequence[str]], template: str, special: Sequence[str]) -> Path:
    """Write the checkpoint. A script is tokens of its own, all different among all scripts; its end ends the answer.

    Args:
        special: those of them that the tokenizer leaves out of texts.
    """
    from safetensors.numpy import load_file, save_file

    make_tiny_llama(folder, hidden_size=HIDDEN)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [text for script in scripts for text in script]
    assert len(set(texts)) == len(texts) < HIDDEN
    tokenizer.add_tokens([AddedToken(text, special=text in special, normalized=False) for text in texts])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    ids = {text: tokenizer.token_to_id(text) for text in texts}
    model = json.loads((folder / "config.json").read_text())
    model["vocab_size"] = tokenizer.get_vocab_size()
    (folder / "config.json").write_text(json.dumps(model))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensor[:] = 0
    embedding, head = np.zeros((2, model["vocab_size"], HIDDEN), np.float32)
    for script in scripts:
        for text, after in zip(script, [*script[1:], None], strict=True):
            at = texts.index(text)
            embedding[ids[text], at] = 1
            head[model["eos_token_id"] if after is None else ids[after], at] = 5
    tensors |= {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
