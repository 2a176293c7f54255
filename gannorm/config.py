"""From a composed config to a typed one: every name looked up in its table, every value checked.

A key that is not in its class, a missing one, or a value that no run can work with is refused with
its full name.
"""

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError, create_model

from gannorm.data import DATA
from gannorm.errors import RequestError
from gannorm.metrics.figures import FIGURES
from gannorm.models.norm_factory import NORMS
from gannorm.schema import Config
from gannorm.tasks import TASKS
from gannorm.tasks.losses import LOSSES

# By the key that holds a name: its table. An entry of the first three has a class of its own for
# the rest of its section.
TABLES: dict[str, dict[str, Any]] = {
    "model.name": TASKS,
    "norm.name": NORMS,
    "data.name": DATA,
    "loss.gan": LOSSES,
    "metrics.best": FIGURES,
}


def typed(cfg: DictConfig) -> Config:
    """The composed config as a `Config`.

    Raises:
        RequestError: an unknown key (with the nearest right one) or name, a missing value, a wrong
            type, a value out of range.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise RequestError(f"{error.full_key}: missing value") from error
    except OmegaConfBaseException as error:
        raise RequestError(explain(error, keys_of(cfg))) from error
    assert isinstance(plain, dict)
    sections: dict[str, Any] = {}
    for key, table in TABLES.items():
        section, _, field = key.partition(".")
        name = str((plain.get(section) or {}).get(field))
        if name not in table:
            said = "missing value" if name == "None" else f"{name!r} is unknown"
            choose = f"choose {section}= " if field == "name" else "choose "
            raise RequestError(f"{key}: {said}; {choose}{', '.join(table)}")
        if field == "name":
            sections[section] = (table[name].config, ...)
    schema = create_model("Config", __base__=Config, **sections)
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        raise RequestError(_first_fault(error, schema, plain)) from error


def _first_fault(error: ValidationError, schema: type[BaseModel], plain: Any) -> str:
    """One line for what pydantic found first, unknown keys before all others."""
    faults = error.errors(include_url=False)
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in fault["loc"] if isinstance(part, str)]  # no places in a list
    key, said = ".".join(path), fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        return f"{key} is not a configuration key{nearest(key, fields_of(schema))}"
    if fault["type"] == "missing":
        return f"{key}: missing value"
    value = plain
    for part in path:
        value = value[part]
    if isinstance(value, dict):  # of a whole section, which names its keys itself
        return said
    kind, context = fault["type"], fault.get("ctx", {})
    if kind == "literal_error" and isinstance(fault["input"], str | None):
        return f"{key}: {fault['input']!r} is unknown; choose {_listed(context['expected'])}"
    if kind == "value_error":
        return f"{key}={value} {said}"
    if kind in ("literal_error", "finite_number") or "expected" not in context and context.keys():
        return f"{key}={value} {re.sub('(Input|List) should', 'must', said)}"
    return f"{key}: {value!r} {said.removeprefix('Input ')}"


def _listed(expected: str) -> str:
    """'a', 'b' or 'c' as a, b, c."""
    return expected.replace("'", "").replace(" or ", ", ")


def fields_of(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a class."""
    keys = []
    for name, field in schema.model_fields.items():
        keys.append(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += fields_of(kind, f"{prefix}{name}.")
    return keys


def keys_of(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a config."""
    keys = []
    for key in node:
        name = f"{prefix}{key}"
        keys.append(name)
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            keys += keys_of(child, name + ".")
    return keys


def nearest(word: str, choices: list[str]) -> str:
    """' (did you mean X?)', or nothing."""
    matches = get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""


def explain(error: OmegaConfBaseException, keys: list[str]) -> str:
    """One line for an error of omegaconf's."""
    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    if not key:
        return first
    if key.partition("[")[0] not in keys:  # an element of a list is no key
        return f"{key} is not a configuration key{nearest(key, keys)}"
    return f"{key}: {first}"


def explain_composition(error: Exception, conf: Path) -> str:
    """One line for an error of Hydra's while it composed the files under `conf`."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        choices = sorted(error.options)
        return f"{group}={choice} is unknown{nearest(choice, choices)}; choose {group}= " + (
            ", ".join(choices)
        )
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, OmegaConfBaseException):
        keys = keys_of(OmegaConf.load(conf / "config.yaml"))
        for path in sorted(conf.glob("*/*.yaml")):
            if path.parent.name != "experiment":
                keys += [path.parent.name, *keys_of(OmegaConf.load(path), f"{path.parent.name}.")]
        keys = [k for k in keys if "defaults" not in k and not k.startswith("hydra")]
        return explain(cause, keys)
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
