"""Adapters of a base model as PEFT writes them: read, checked, merged into a checkpoint."""
