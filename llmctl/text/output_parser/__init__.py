"""The model's text apart: reasoning, content, tool calls. One streaming parser; the formats are rows of data."""
