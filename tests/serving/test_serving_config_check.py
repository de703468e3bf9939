"""What ``llmctl serve`` refuses before it starts anything."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from llmctl.config import ServeConfig, load_yaml_options
from llmctl.errors import UsageError
from llmctl.serving.config_check import check_config

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "serve").glob("*.yaml"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": ""}, "--model is required"),
        ({"log_level": "loud"}, "--log-level: expected debug, info"),
        ({"scheduling_policy": "lifo"}, "--scheduling-policy: expected fcfs, priority, fair"),
        ({"pooling": "cls"}, "--pooling: expected last, mean, found 'cls'"),
        ({"ssl_certfile": "cert.pem"}, "--ssl-certfile needs --ssl-keyfile"),
        ({"ssl_keyfile": "key.pem"}, "--ssl-keyfile needs --ssl-certfile"),
        ({"kv_cache_memory": "lots"}, "--kv-cache-memory: expected a size"),
        ({"kv_cache_memory": ""}, "--kv-cache-memory: expected a size"),
        ({"kv_cache_dtype": "int3"}, "--kv-cache-dtype: expected one of auto"),
        ({"gpu_memory_utilization": 1.1}, "--gpu-memory-utilization: expected a share above 0 and up to 1, found 1.1"),
        ({"gpu_memory_utilization": -0.1}, "--gpu-memory-utilization: expected a share"),
        ({"chat_template": "no-such-file"}, "--chat-template no-such-file: no such file"),
        ({"itl_target": "soon"}, "--itl-target: expected auto, 0 or milliseconds, found 'soon'"),
        ({"itl_target": "-1"}, "--itl-target: expected auto, 0 or milliseconds"),
        ({"itl_target": "inf"}, "--itl-target: expected auto, 0 or milliseconds"),
        ({"metrics_prefix": "2x"}, "--metrics-prefix: expected letters, digits and underscores, .* found '2x'"),
        ({"metrics_prefix": "vllm:"}, "--metrics-prefix: .* found 'vllm:'"),
        ({"metrics_prefix": ""}, "--metrics-prefix: .* found ''"),
        ({"deadline": "soon"}, "--deadline: expected ttft:MS, itl:MS or ttft:MS,itl:MS .* found 'soon'"),
        ({"deadline": ""}, "--deadline: expected"),
        ({"deadline": "ttft:300", "scheduling_policy": "fcfs"}, "--deadline: the scheduling policy fcfs knows no"),
        ({"shed": True, "scheduling_policy": "fcfs"}, "--shed: the scheduling policy fcfs knows no deadlines"),
        ({"max_body": "0"}, "--max-body"),
        ({"max_body": "lots"}, "--max-body: expected a size"),
        ({"api_key": ""}, "--api-key is empty"),
        ({"api_key": " , "}, "--api-key is empty"),
        ({"priority_keys": ","}, "--priority-keys is empty"),
        ({"request_log_text": True}, "--request-log-text needs --request-log"),
        ({"otlp_traces_endpoint": "c:4317"}, "--otlp-traces-endpoint: expected the URL of an OTLP/HTTP collector"),
    ],
)
def test_bad_settings(changes: dict[str, object], said: str) -> None:
    good = ServeConfig(model="m")
    check_config(good)
    with pytest.raises(UsageError, match=said):
        check_config(replace(good, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_settings(recipe: Path) -> None:
    options = load_yaml_options(recipe, [field.name for field in fields(ServeConfig)])
    check_config(ServeConfig(model="m", **options))
    defaults = ServeConfig()
    for name, value in options.items():
        default = getattr(defaults, name)
        assert type(value) in ((int, float) if default is None else (type(default), int)), name
