"""Tokenizer, chat template, incremental detokenization. Imports neither torch nor transformers."""
