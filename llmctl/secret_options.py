"""The options and variables that hold secrets."""

SECRET_OPTIONS = frozenset({"api_key", "priority_keys", "a_api_key", "b_api_key"})
"""Options whose values are shown nowhere."""
SECRET_VARIABLES = frozenset(f"LLMCTL_{name.upper()}" for name in SECRET_OPTIONS)
"""Their variables of the environment, which no process is given that we start, and that does not need them."""
