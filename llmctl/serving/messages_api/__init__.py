"""Anthropic's Messages API: requests become chats, and what the model writes blocks of a message."""
