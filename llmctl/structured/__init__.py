"""Structured output: grammars that an output must match, compiled, and the tokens that they allow next."""
