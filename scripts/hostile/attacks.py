"""The table of attacks."""

from __future__ import annotations

from hostile import bodies, connections, malformed, workers
from hostile.arena import Attack
from hostile.bodies import posted
from hostile.connections import GET, burst, drops, leavers, never_read
from hostile.malformed import sent
from hostile.wire import CLOSED

OK = frozenset({200})
REFUSED = frozenset({400})
EITHER = frozenset({200, 400})
BUSY = frozenset({429})
"""A queue is full: that of requests, or that of long texts."""
GONE = frozenset({CLOSED})

ATTACKS = (
    Attack("many prompts", "10,000 prompts x n=128", REFUSED, posted(bodies.many_prompts, 4)),
    Attack("huge JSON", "4 to 33 MB of it", frozenset({400, 413}), posted(bodies.huge_json), large=True),
    Attack("deep JSON", "up to a million levels", REFUSED, posted(bodies.deep_json)),
    Attack("duplicate keys", "one key 100,000 times", EITHER, posted(bodies.duplicate_keys, 10)),
    Attack("NaN", "NaN, infinities, 1e999", EITHER, posted(bodies.not_numbers, 2)),
    Attack("out of range", "every field, impossible values", EITHER, posted(bodies.out_of_range, 2)),
    Attack("edges", "ids, seeds, sizes at their ends", EITHER | {403}, posted(bodies.edges)),
    Attack("long prompts", "1 and 10 MB of text", EITHER | BUSY, posted(bodies.long_prompts), large=True),
    Attack("many messages", "200,000 messages, a million ids", EITHER | BUSY, posted(bodies.many_messages), large=True),
    Attack("word floods", "stop and bad_words, 10^6 of them", EITHER | BUSY, posted(bodies.word_floods, 4), large=True),
    Attack("bias floods", "logit_bias for every token", EITHER, posted(bodies.bias_floods, 4), large=True),
    Attack("templates", "variables of the template's own", EITHER | BUSY, posted(bodies.templates, 2)),
    Attack("strange texts", "NUL, surrogates, combining", EITHER | {404}, posted(bodies.strange_texts, 2)),
    Attack("broken UTF-8", "bytes that are none", REFUSED, posted(bodies.broken_utf8, 4)),
    Attack("costly answers", "20 log-probabilities, echo, n=64", OK, posted(bodies.costly_answers, 2)),
    Attack("content types", "not JSON", frozenset({415}), sent(malformed.content_types)),
    Attack("encodings", "gzip, UTF-16", REFUSED, sent(malformed.encodings)),
    Attack("lengths", "a Content-Length that is none", REFUSED | GONE | {413, 431}, sent(malformed.lengths)),
    Attack("too long", "bodies promised beyond the limit", frozenset({413}), sent(malformed.too_long)),
    Attack("chunks", "chunked with wrong sizes", EITHER | {408, 413, 431}, sent(malformed.chunks, 1)),
    Attack("smuggling", "two framings of one body", EITHER | {408}, sent(malformed.smuggling)),
    Attack("methods", "FOO, TRACE, CONNECT, h2c", EITHER | {404, 405, 431}, sent(malformed.methods, 1)),
    Attack("paths", "dots, NUL, 50 KB", frozenset({200, 400, 404, 431}), sent(malformed.paths)),
    Attack("no HTTP", "other protocols, noise", EITHER | GONE | {408, 505}, sent(malformed.no_http, 1)),
    Attack("TLS", "a handshake on a plain port", REFUSED, sent(malformed.tls, 20)),
    Attack("keys", "none, wrong, in the URL", frozenset({401, 404}), sent(malformed.keys)),
    Attack("endless headers", "headers without end", frozenset({431}), connections.endless_headers),
    Attack("slow headers", "300 clients, a byte in 0.5 s", frozenset({408}), drops(GET, 300)),
    Attack("slow bodies", "300 clients, a byte in 0.5 s", frozenset({408}), connections.slow_bodies),
    Attack("silence", "1,000 connections without a word", GONE, connections.silent),
    Attack("pipelining", "60 and 180 requests in one write", OK, connections.pipelined),
    Attack("half-closed", "clients that end their side", OK, connections.half_closed),
    Attack("leavers", "300 aborts at random moments", OK, leavers(300, 60, reset=False)),
    Attack("resets", "300 resets amid streams", OK, leavers(300, 60, reset=True)),
    Attack("never read", "64 streams nobody reads", OK, never_read(64, 10.0), large=True),
    Attack("burst 2,000", "2,000 connections at once", OK | BUSY, burst(2000), fills_queue=True),
    Attack("burst 5,000", "5,000 connections at once", OK | BUSY, burst(5000), fills_queue=True, large=True),
    Attack("queue games", "a hog's 250 beside a single one", OK, connections.queue_games),
    Attack("metrics flood", "all that is rendered, 300 times", OK, connections.metrics_flood),
    Attack("worker killed", "kill -9 amid 60 streams", OK, workers.kill),
    Attack("worker stopped", "SIGSTOP for 5 s, SIGCONT", OK, workers.stop),
)  # fmt: skip
