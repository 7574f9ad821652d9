"""Reads a run's YAML file or preset, applies `--set` overrides, and names every mistake with its nearest fix.

The YAML dialect is small on purpose: YAML 1.2 booleans (so that the language `no` stays a string), no aliases, no
duplicate keys, at most 1 MiB. A file may start from a preset with `preset: NAME`; its own keys win.
"""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config import Config
from pipeline.errors import UserError

MAX_CONFIG_BYTES = 1 << 20
_PACKAGE_DATA = "package://"


class _Loader(yaml.SafeLoader):
    """SafeLoader without aliases, duplicate keys and YAML 1.1's yes/no/on/off booleans."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.YAMLError(f"line {mark.line + 1}: aliases (*name) are not supported, write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def presets() -> list[str]:
    """Names of the configurations that ship with the package."""
    folder = resources.files("pipeline") / "configs"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load(source: str, overrides: list[str] | None = None) -> Config:
    """Build the `Config` of a YAML file or a preset's name, with `key.path=value` overrides applied last.

    Raises:
        UserError: the file is missing or not valid, a key is unknown, a value does not fit; the sentence says which.
    """
    tree = _with_preset(_parse(_read(source), source), source)
    for override in overrides or []:
        _apply(tree, override)
    _expand_package_data(tree)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from None


def dump(config: Config) -> str:
    """The config with every default filled in, as YAML; `storage_options` is left out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(source: str) -> str:
    path = Path(source)
    if path.is_file():
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(f"{source}: larger than {MAX_CONFIG_BYTES} bytes, which is no config file")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if source in presets():
        return (resources.files("pipeline") / "configs" / f"{source}.yaml").read_text(encoding="utf-8")
    near = difflib.get_close_matches(source, presets(), n=1)
    hint = f"did you mean the preset {near[0]}?" if near else f"presets: {', '.join(presets())}"
    raise UserError(f"config {source!r} is neither a file nor a preset ({hint})")


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: not valid YAML: {detail}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{source}: expected `section: key: value` mappings at the top, found {type(tree).__name__}")
    return tree


def _with_preset(tree: dict[str, Any], source: str) -> dict[str, Any]:
    name = tree.pop("preset", None)
    if name is None:
        return tree
    if name not in presets():
        raise UserError(f"{source}: preset {name!r} does not exist; presets: {', '.join(presets())}")
    base = _parse(_read(name), name)
    return _merge(base, tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    path, separator, raw = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UserError(f"--set {override!r}: expected key.path=value, for example --set corpus.shard_mb=64")
    for key in keys[:-1]:
        below = tree.setdefault(key, {})
        if not isinstance(below, dict):
            raise UserError(f"--set {path}: {key} is a value, not a section")
        tree = below
    try:
        tree[keys[-1]] = yaml.load(raw, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass
    except yaml.YAMLError:
        raise UserError(f"--set {path}: cannot read the value {raw!r} as YAML; quote it") from None


def _expand_package_data(tree: Any) -> None:
    """Turn `package://demo/...` into the path of data that ships with the package, in place."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        if isinstance(value, str) and value.startswith(_PACKAGE_DATA):
            tree[key] = str(resources.files("pipeline") / value.removeprefix(_PACKAGE_DATA))
        else:
            _expand_package_data(value)


def _explain(error: ValidationError, source: str) -> str:
    sentences = []
    for problem in error.errors(include_url=False, include_context=False, include_input=True):
        path = ".".join(str(step) for step in problem["loc"])
        if problem["type"] == "extra_forbidden":
            sentences.append(f"unknown key {path}{_nearest(problem['loc'])}")
        elif problem["type"] == "missing":
            sentences.append(f"{path} is required")
        elif path.startswith("storage_options"):
            sentences.append(f"{path}: {problem['msg']}")  # the value may be a credential
        else:
            message = problem["msg"].removeprefix("Value error, ")
            given = "" if problem["type"] == "value_error" else f" (given: {problem['input']!r})"
            sentences.append(f"{path + ': ' if path else ''}{message}{given}")
    return f"{source}: " + "; ".join(sentences)


def _nearest(location: tuple[int | str, ...]) -> str:
    model: type[BaseModel] = Config
    for step in location[:-1]:
        annotation = model.model_fields[str(step)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return ""
        model = annotation
    near = difflib.get_close_matches(str(location[-1]), model.model_fields, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else f"; keys here: {', '.join(model.model_fields)}"
