"""Tool calls and reasoning: what a request asks for, what the template is shown, what the message is made of."""
