"""A recipe's YAML file, read strictly: what YAML would take in silence is refused."""

from pathlib import Path
from typing import Any

import yaml

from hf_moe.finetuning.arguments import RecipeError


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would take the last in silence, aliases, which can explode, and
    12:30 for a number: YAML would read 750."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} comes twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        if ":" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} is read as minutes and seconds: put text in quotes", node.start_mark
            )
        is_float = node.tag.endswith("float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        RecipeError: If the file is missing, no YAML, no mapping, has a key twice or an alias.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise RecipeError(f"the config {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise RecipeError(f"the config {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"the config {str(path)!r} must be a mapping of keys to values, got {type(value).__name__}.")
    return value


def beside_config(given: dict[str, Any], config: Path) -> dict[str, Any]:
    """What a config says, its data and chat template found: in the working directory, or else beside the config.

    A path that is in neither place stays as it is: data may be names on the Hub.
    """

    def find(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return {**value, "path": find(value["path"])}
        if not isinstance(value, str) or Path(value).exists():
            return value
        beside = config.parent / value
        return str(beside.resolve()) if beside.exists() else value

    found = dict(given)
    if isinstance(given.get("data"), list):
        found["data"] = [find(value) for value in given["data"]]
    if "chat_template" in given:
        found["chat_template"] = find(given["chat_template"])
    return found
