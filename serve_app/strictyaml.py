"""YAML as everything here reads it: what YAML would let pass in silence, and what is no value, is an error."""

from collections.abc import Hashable
from typing import Any

import yaml


class YamlError(ValueError):
    """The message is what the text is or has; `line` counts from 1, None where there is no one line."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line

    def within(self, what: str) -> str:
        """The message in whole, of the text that is `what`."""
        return f"{what}{f', line {self.line}' if self.line else ''}: {self}"


def parse(text: str) -> Any:
    """What `text` says. Raises YamlError."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", error)
        raise YamlError(f"is not valid YAML: {problem}", mark.line + 1 if mark else None) from None
    except RecursionError:
        raise YamlError("is nested too deep") from None


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:
            # Such as a 30th of February, which looks like a date and is none.
            message = f"{node.value!r} is no {node.tag.rpartition(':')[2]}: {error}"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None
