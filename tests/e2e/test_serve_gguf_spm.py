"""A GGUF file with a sentencepiece vocabulary, served: texts, streams and grammars through its byte tokens."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fixtures import ServerProcess
from gguf_files import write_gguf
from huggingface_hub import InferenceClient
from spm_vocabulary import spm_vocabulary


def test_a_stream_is_what_transformers_decodes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from llmctl.artifact.builder import build_engine
    from llmctl.config import BuildConfig

    torch.manual_seed(3)
    vocabulary = spm_vocabulary()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": len(vocabulary["list"])}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=128))
    path = write_gguf(tmp_path / "m.gguf", model, tokenizer=vocabulary)
    engine = build_engine(BuildConfig(model=str(path), target="reference", output=str(tmp_path / "engine")))
    theirs = PreTrainedTokenizerFast.from_pretrained(engine)
    pattern = "(the|é| fox|世界|\n|😀){12}"
    with ServerProcess("--model", str(engine)) as server:
        server.wait_ready()
        assert server.post("/tokenize", {"prompt": " the 界"})[1]["tokens"] == theirs(" the 界").input_ids
        client = InferenceClient(base_url=server.url, timeout=60)
        *before, last = client.text_generation(
            "the fox",
            max_new_tokens=100,
            temperature=2.0,
            seed=1,
            details=True,
            stream=True,
            grammar={"type": "regex", "value": pattern},
        )
    tokens = [output.token for output in (*before, last)]
    ids = [token.id for token in tokens]
    prompt = theirs("the fox").input_ids
    whole, head = (theirs.decode(given, skip_special_tokens=True) for given in (prompt + ids, prompt))
    streamed = "".join(token.text for token in tokens if not token.special)
    assert streamed == last.generated_text == whole.removeprefix(head)
    assert set(theirs.convert_ids_to_tokens(ids)) >= {"<0xE7>", "<0x95>", "<0x8C>"}, json.dumps(streamed)
