"""Flags whose values are dictionaries: a flag adds to the dictionary of a recipe, key by key."""

import json
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

# Written name=value,name=value; all others are JSON objects.
_PAIRS = ("config_overrides", "optim_args")


def dictionary_flags(classes: Sequence[type]) -> list[str]:
    """Name the fields of dataclasses that hold dictionaries."""
    names = dict.fromkeys(_PAIRS)
    for kind in classes:
        for name, hint in get_type_hints(kind).items():
            if any(part is dict or get_origin(part) is dict for part in get_args(hint)):
                names[name] = None
    return list(names)


def merge_dictionaries(name: str, first: Any, second: Any) -> Any:
    """Merge two values of the dictionary flag `name`: dictionaries, their texts, or None. The second one wins.

    A value of another kind, such as the path of a JSON file, replaces the first.

    >>> merge_dictionaries("config_overrides", "hidden_size=64,num_hidden_layers=3", {"num_hidden_layers": 2})
    'hidden_size=64,num_hidden_layers=2'
    >>> merge_dictionaries("lr_scheduler_kwargs", '{"min_lr": 0.1, "num_cycles": 1}', '{"num_cycles": 2}')
    '{"min_lr": 0.1, "num_cycles": 2}'
    """
    if name in _PAIRS:
        pairs = {**_pairs(first), **_pairs(second)}
        return ",".join(key if value is None else f"{key}={value}" for key, value in pairs.items())
    below, above = _json_object(first), _json_object(second)
    return second if below is None or above is None else json.dumps(_merge(below, above))


def _pairs(value: Any) -> dict[str, Any]:
    if value is None or isinstance(value, dict):
        return value or {}
    parts = [part.partition("=") for part in value.split(",") if part.strip()]
    return {key.strip(): text if equals else None for key, equals, text in parts}  # None: malformed, and refused later


def _json_object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            return None  # the parser of the flag refuses it
    return value if isinstance(value, dict) else None


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _merge(below[key], above[key])
    return merged
