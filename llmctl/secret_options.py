"""The options that hold secrets."""

SECRET_OPTIONS = frozenset({"api_key", "priority_keys", "a_api_key", "b_api_key"})
"""Options, and with LLMCTL_ before them variables of the environment, whose values are shown nowhere."""
