"""Worker process, client to it, OpenAI protocol, HTTP application, metrics."""
