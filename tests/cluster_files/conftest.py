"""The manifests as kubectl renders them."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(path.parent.name for path in KUBERAY.glob("overlays/*/kustomization.yaml"))
Object = dict[str, Any]


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", KUBERAY / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Manifests:
    """What an overlay deploys."""

    def __init__(self, overlay: str) -> None:
        self.overlay = overlay
        kubectl = Path(sys.executable).parent / "kubectl"
        done = subprocess.run(
            [kubectl, "kustomize", KUBERAY / "overlays" / overlay], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        self.text = done.stdout
        self.objects: list[Object] = list(yaml.safe_load_all(done.stdout))

    def all(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    @property
    def service(self) -> Object:
        (found,) = self.all("RayService")
        spec: Object = found["spec"]
        return spec

    @property
    def head(self) -> Object:
        """The group, not the pod."""
        group: Object = self.service["rayClusterConfig"]["headGroupSpec"]
        return group

    @property
    def workers(self) -> list[Object]:
        groups: list[Object] = self.service["rayClusterConfig"]["workerGroupSpecs"]
        return groups

    @property
    def pods(self) -> list[Object]:
        """Templates of all pods with Ray in them."""
        return [group["template"] for group in (self.head, *self.workers)]

    @property
    def config(self) -> Object:
        """Of Serve."""
        parsed: Object = yaml.safe_load(self.service["serveConfigV2"])
        return parsed


@pytest.fixture(scope="session", params=OVERLAYS)
def manifests(request: pytest.FixtureRequest) -> Manifests:
    return Manifests(request.param)
