"""What a JSON schema cannot say of a request, in the words of its refusals; the description has all of it as text."""

from __future__ import annotations

import re

DOCUMENTED = re.compile(
    r"maximum context length|at least one token, found none|outside the vocabulary|token ids \(the vocabulary\)"
    r"|min_tokens: expected at most max_(output_)?tokens|stream_options: only with stream|best_of: not supported; use n"
    r"|prompt_logprobs: not available with stream|top_logprobs: needs logprobs|content: expected text, found none"
    r"|--trust-request-chat-template|continue_final_message: "
    r"|sequences in a request|chat template: |bad_words: expected non-empty strings|recursion limit exceeded"
    r"|prompt_logprobs: expected at most \d+ log-probabilities in all"
    r"|expected one description of the output|expected one of json, regex|expected a JSON schema|response_format"
    r"|cannot be enforced: |to compile|grammars are being compiled|the output cannot go on"
    r"|: only with (tools|functions)$|expected one of the request's tools|tools or functions, found both"
    r"|arguments: expected a JSON object|dimensions: expected at most the model's"
    r"|expected it to end in text|tool_use_id: expected the id|' is none of role '|no tool call found for function call"
    r"|every sample would be the same|: not available in a stream$|top_n_tokens: only with details"
)
