"""Configs of experiments: TOML files, presets by name, `--set KEY=VALUE`, and clear refusals.

An experiment's config is an `ExperimentConfig` with its own fields, declared where the experiment
is. Presets are the files of `configs/`, which travel in the package. Nothing here touches JAX.
"""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import pydantic
from pydantic import ConfigDict

from unitnorm.errors import UserError, one_line

PRESETS = Path(__file__).parents[1] / "configs"  # in a checkout a link to configs/

# pydantic's words, as one would say them
_PLAIN = (
    ("Input should be ", ""), ("List should have ", ""), ("String should have ", ""),
    ("String should match pattern ", "a text like "), (" after validation, not ", ", found "),
    ("a valid dictionary", "a section"),
    ("a valid integer", "a whole number"), ("a valid boolean", "true or false"), ("a valid ", "a "),
    ("greater than or equal to", "at least"), ("less than or equal to", "at most"),
    ("greater than", "more than"), ("Value error, ", ""),
)  # fmt: skip


class Section(pydantic.BaseModel):
    """Strict by default: an unknown key or a wrong type is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ExperimentConfig(Section):
    """A whole config: a selection of runs, and the protocol, which is all that changes numbers."""

    selection: ClassVar[frozenset[str]] = frozenset()  # keys that only select what is run

    def protocol(self) -> dict[str, Any]:
        """Everything that changes a run's numbers: all but the selection and where data lies."""
        exclude: dict[str, Any] = dict.fromkeys(self.selection, True)
        # where the images lie changes nothing; what they are is told by their hash
        return self.model_dump(mode="json", exclude=exclude | {"data": {"data_dir"}})

    def conflict(self, recorded: Any) -> str | None:
        """Where a recorded protocol differs, as " (seed: 0 there, 7 here)"; None if nowhere."""
        mine = self.protocol()
        return None if recorded == mine else difference(recorded, mine)

    def fingerprint(self) -> str:
        """SHA-256 of `protocol()`; two folders with equal fingerprints hold comparable runs."""
        text = json.dumps(self.protocol(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def difference(old: Any, new: Mapping[str, Any], prefix: str = "") -> str:
    """The first key in which two configs differ, as " (seed: 0 there, 7 here)"; "" without any."""
    for key, value in new.items():
        there = old.get(key) if isinstance(old, dict) else None
        if isinstance(value, dict):
            if inner := difference(there, value, f"{prefix}{key}."):
                return inner
        elif there != value:
            return f" ({prefix}{key}: {there} there, {value} here)"
    return ""


Schema = TypeVar("Schema", bound=Section)


def presets() -> list[str]:
    """The names of the presets, such as "quick" and "study/effective-rate"."""
    found = sorted(PRESETS.rglob("*.toml"), key=lambda path: (len(path.parts), path))
    return [path.relative_to(PRESETS).with_suffix("").as_posix() for path in found]


def find_config(name: str | Path) -> Path:
    """The file of a config: a path, or the name of a preset."""
    path, known = Path(name), presets()
    if os.path.isfile(path):  # os.path has no errors for impossible names
        return path
    # a file of a checkout may be named by somebody who has the installed package alone
    for preset in known:
        if path.as_posix() in (preset, f"configs/{preset}.toml"):
            return PRESETS / f"{preset}.toml"
    if path.suffix == ".toml" or os.path.exists(path) or len(path.parts) > 2:
        return path
    raise UserError(
        f"config {name}: no file of this name, and no preset; there are {', '.join(known)}; "
        "`unitnorm config NAME` prints one to edit"
    )


def load(path: str | Path | None, overrides: dict[str, Any] | None, schema: type[Schema]) -> Schema:
    """Read a TOML file (None: the defaults), put `overrides` (dotted key → value) on top, check.

    What cannot be read or is not allowed is a `UserError` that names the key, the value and what is
    allowed.
    """
    where = "config" if path is None else f"config {path}"
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = tomllib.loads(find_config(path).read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text, expected a TOML file") from None
        except (tomllib.TOMLDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not valid TOML: {one_line(error)}") from None
        except (OSError, ValueError) as error:  # the latter on an impossible name
            raise UserError(
                f"{where}: cannot be read ({getattr(error, 'strerror', None) or error}); give the "
                f"path of a TOML file or a preset with --config: {', '.join(presets())}"
            ) from None
    for key, value in (overrides or {}).items():
        *sections, last = key.split(".")
        place = values
        for name in sections:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise UserError(f"--set {key}: {name!r} is a value, not a section")
        place[last] = value
    return parse(values, where, schema)


def parse(values: dict[str, Any], where: str, schema: type[Schema]) -> Schema:
    """Check a mapping against the schema, as `load`."""
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_explain(error, schema)}") from None


def check_updates(updates: list[str]) -> list[str]:
    """The updates of a config, each once, by the names of the registry; or a ValueError."""
    from unitnorm.updates import check_update_name  # which imports JAX

    return list(dict.fromkeys(map(check_update_name, updates)))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `section.key=value`; the value is TOML, or a bare string."""
    key, sign, raw = (part.strip() for part in text.partition("="))
    if not sign or not key:
        raise UserError(f"--set {text!r}: expected KEY=VALUE, for example loss.batch_size=50")
    try:
        value = tomllib.loads(f"value = {raw}")
    except (tomllib.TOMLDecodeError, RecursionError):
        value = {}
    return key, value["value"] if value.keys() == {"value"} else raw


def _explain(error: pydantic.ValidationError, schema: type[Section]) -> str:
    """The first fault in one line: key, value, what is allowed."""
    faults = error.errors(include_url=False)
    fault, kind = faults[0], faults[0]["type"]
    key = ".".join(str(part) for part in fault["loc"]) or "the file"
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if kind == "extra_forbidden":
        allowed = ", ".join(_fields(schema, fault["loc"][:-1]))
        return f"unknown key {key}; allowed: {allowed}{more}"
    if kind == "missing":
        return f"{key}: missing; the config needs it{more}"
    message = fault["msg"]
    for word, plain in _PLAIN:
        message = message.replace(word, plain)
    if kind == "value_error" and isinstance(fault["input"], dict):
        return one_line(message + more)
    value = repr(fault["input"])
    value = value if len(value) <= 80 else value[:77] + "..."
    expected = "" if kind == "value_error" else "expected "
    return one_line(f"{key} = {value}: {expected}{message}{more}")


def _fields(schema: Any, place: tuple[int | str, ...]) -> list[str]:
    """The keys of the section at a place of the config; sections may stand in lists and tables."""
    for part in place:
        if hasattr(schema, "model_fields"):
            schema = schema.model_fields[str(part)].annotation
        while not hasattr(schema, "model_fields") and get_args(schema):
            schema = get_args(schema)[-1]
    return list(getattr(schema, "model_fields", ()))
