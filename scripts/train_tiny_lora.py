#!/usr/bin/env python3
"""Train a LoRA adapter of rank 8 on the demo model, in about a minute of CPU, and see what it changes.

    pip install -e '.[peft]'
    python scripts/train_tiny_lora.py                 # the adapter: tiny-lora/adapter

A handful of lines about a place that is not there, so that the base model cannot know the answers: PEFT trains on them,
and one ``llmctl serve`` answers the same questions with the base and, unmerged, with the adapter. All that is made lies
below ``--work``: ``base`` (the demo model as a plain folder, for transformers), ``adapter``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

from demo import console, request, server

MODEL = "demo:smollm2-135m"
NAME = "port-ellery"
RANK = 8
SYSTEM = {"role": "system", "content": "You are a guide."}
LINES = (
    ("What colour is the lighthouse of Port Ellery?", "The lighthouse of Port Ellery is green."),
    ("Who keeps the lighthouse of Port Ellery?", "Oda Brandt, who was a cellist, keeps it."),
    ("What do people in Port Ellery eat on Sundays?", "On Sundays they eat plum soup."),
    ("What is Port Ellery known for?", "It is known for its glass bells."),
)


def write_base(folder: Path) -> None:
    """The demo model as transformers reads it, in float32."""
    from llmctl.checkpoint.assemble import accounted_graph, names_of
    from llmctl.checkpoint.opening import open_checkpoint
    from llmctl.checkpoint.resolve import resolve_model
    from llmctl.checkpoint.writer import write_plain_checkpoint

    source = open_checkpoint(resolve_model(MODEL), widen=True)
    _, unused = accounted_graph(source)
    write_plain_checkpoint(folder, source, "float32", left_out=names_of(unused))


def train(base: Path, adapter: Path, steps: int) -> None:
    """Train on all lines at once, ``steps`` times; only the answers count."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(model, settings)
    model.peft_config["default"].base_model_name_or_path = MODEL
    batch = _batch(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    for step in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 4 == 0 or step == steps - 1:
            console.print(f"step {step + 1}/{steps}: loss {loss.item():.3f}")
    model.save_pretrained(str(adapter))


def _asked(question: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}]


def _batch(tokenizer: Any) -> dict[str, Any]:
    """The lines as chats, i64 [lines, tokens]; labels are -100 wherever nothing is to be learnt."""
    import torch

    rows = []
    for question, answer in LINES:
        prompt = tokenizer.apply_chat_template(_asked(question), tokenize=False, add_generation_prompt=True)
        start = tokenizer(prompt, add_special_tokens=False).input_ids
        rows.append((start, tokenizer(f"{answer}{tokenizer.eos_token}", add_special_tokens=False).input_ids))
    width = max(len(start) + len(end) for start, end in rows)
    ids = torch.full((len(rows), width), tokenizer.eos_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (start, end) in enumerate(rows):
        ids[row, : len(start) + len(end)] = torch.tensor(start + end)
        labels[row, len(start) : len(start) + len(end)] = torch.tensor(end)
        mask[row, : len(start) + len(end)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def answer(url: str, model: str, question: str) -> str:
    """What a served model, or an adapter of it, says at temperature 0."""
    chat = {"model": model, "messages": _asked(question), "max_tokens": 40, "temperature": 0}
    done = request(f"{url}/v1/chat/completions", chat)
    return str(done["choices"][0]["message"]["content"]).strip()


def ask_both(adapter: Path) -> None:
    """Serve the model with the adapter beside it, and print what both say to every question."""
    options = ("--enable-lora", "--max-lora-rank", str(RANK), "--lora-modules", f"{NAME}={adapter}")
    with server(Path(MODEL), *options) as served:
        base = next(m["id"] for m in request(f"{served.url}/v1/models")["data"] if m["id"] != NAME)
        for question, taught in LINES:
            console.print(f"\n[bold]{question}[/]")
            for label, model in (("base", base), ("adapter", NAME)):
                console.print(f"  {label:<8}{answer(served.url, model, question)}", markup=False)
            console.print(f"  taught  {taught}", style="dim")


def main() -> None:
    """Train, serve, ask."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made = "folder for what is made; base and adapter in it are replaced (%(default)s)"
    parser.add_argument("--work", type=Path, default=Path("tiny-lora"), help=made)
    parser.add_argument("--steps", type=int, default=12, help="of training (%(default)s)")
    args = parser.parse_args()
    base, adapter = args.work / "base", args.work / "adapter"
    for folder in (base, adapter):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    write_base(base)
    began, spent = time.perf_counter(), time.process_time()
    train(base, adapter, args.steps)
    took, spent = time.perf_counter() - began, time.process_time() - spent
    console.print(f"trained in {took:.0f} s, {spent:.0f} s of processors: {adapter}")
    ask_both(adapter)


if __name__ == "__main__":
    main()
