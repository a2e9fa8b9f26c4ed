"""Makes the parts of the manifests that come from configs/: `make manifests`, after a change of either.

For each overlay, `serve-config.yaml`: the config that its `config.yaml` names, with the changes of
base/config.yaml and its own. Tests fail where what is committed is not what this makes.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OVERLAYS = sorted(path.parent for path in HERE.glob("overlays/*/config.yaml"))
_MADE_BY = "# Made by `make manifests`; change {}.\n"


def generated() -> dict[Path, str]:
    """Every generated file, and what has to be in it."""
    environment = (ROOT / "configs" / "serve.env").read_text()
    files = {HERE / "base" / "serve.env": _MADE_BY.format("configs/serve.env") + environment}
    for overlay in OVERLAYS:
        source = read(overlay / "config.yaml")["config"]
        head = _MADE_BY.format(f"{source}, ../../base/config.yaml or config.yaml")
        files[overlay / "serve-config.yaml"] = head + _dump(_patch(serve_config(overlay)))
    return files


def serve_config(overlay: Path) -> dict[str, Any]:
    """The Serve config that the overlay deploys."""
    asked = read(overlay / "config.yaml")
    config = read(ROOT / asked["config"])
    for changes in (read(HERE / "base" / "config.yaml"), asked):
        config = merged(config, changes["changes"])
    return config


def merged(old: Any, new: Any) -> Any:
    """`old` with what `new` says: mappings key by key, lists of named things name by name, all else replaced."""
    if isinstance(old, dict) and isinstance(new, dict):
        return {**old, **{key: merged(old[key], new[key]) if key in old else new[key] for key in new}}
    if _named(old) and _named(new):
        by_name = merged({item["name"]: item for item in old}, {item["name"]: item for item in new})
        return list(by_name.values())
    return new


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value)


def _patch(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "serve-app"},
        "spec": {"serveConfigV2": _Text(_dump(config))},
    }


class _Text(str):
    """Written as a block."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    _Text, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|")
)


def _dump(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def main() -> int:
    for path, text in generated().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
