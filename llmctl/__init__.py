"""llmctl: quantize, build, serve and bench language models over one engine core."""

__version__ = "0.1.0"
