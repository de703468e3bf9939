"""The API of Hugging Face's text-generation-inference: requests become completions, tokens events."""
