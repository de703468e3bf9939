"""Talking to a model from the terminal: ``llmctl run``."""
