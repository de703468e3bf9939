"""OpenAI's Responses API: ``POST /v1/responses``. A request becomes one of chats, and is answered in its own way."""
