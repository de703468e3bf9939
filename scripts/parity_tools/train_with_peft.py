"""PEFT over bitsandbytes: trains LoRA on a checkpoint of NF4, a few steps as QLoRA does, and says what it computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

_STEPS = 3
_TOKENS = 24


def main(base: Path, adapter: Path, output: Path) -> None:
    """Train; save the adapter, logits f32 [T, vocab] with it and their tokens; print what happened as JSON."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu")
    linears = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    for module in linears:
        module.compute_dtype = torch.float32
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    # When it is not training bitsandbytes multiplies in bfloat16 on some processors.
    model.train()
    tokens = torch.randint(model.config.vocab_size, (1, _TOKENS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(_STEPS):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.save_pretrained(str(adapter))
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
    save_file({"tokens": tokens[0].to(torch.int32), "logits": logits.contiguous()}, output)
    print(json.dumps({"linears": len(linears), "losses": losses}))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
