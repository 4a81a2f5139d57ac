"""How YAML layers and `key=value` become a config, and how a config becomes text again.

    defaults < preset of the method < layers, left to right < key=value

A layer is YAML read as data: numbers and booleans as in YAML 1.2 (`no` and `010` are text), no tags, no
aliases, no interpolation.
"""

import hashlib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from richkd import methods
from richkd.config import Config, Method, check_text
from richkd.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
DEFAULT_LAYER = CONF / "digits.yaml"
SWEEP_SECTIONS = (
    "sweep",
    "refit",
    "warmstart",
    "resources",
    "tracking",
    "paper",
)  # no matter of a single run
# their keys are dotted keys themselves, or names
TABLES = (
    *("sweep.space.", "sweep.settings.", "sweep.grid.rows.", "sweep.grid.methods."),
    *("paper.figures.", "paper.metrics."),
)
# change no result: where things lie and what is used; that data are the same is checked by their digest
UNHASHED = (
    *("device", "storage", "cache"),
    *("data.root", "data.path", "data.names", "data.download", "data.memory"),
    *("train.graphs", "evaluate.rows", "evaluate.corrupted", "diagnose.rows", "diagnose.prompts"),
)
MAX_BYTES, MAX_DEPTH, MAX_KEYS = 1_000_000, 8, 10_000

T = TypeVar("T")


class Entry(NamedTuple):
    """One explicit setting: dotted key, plain value, and where it was written."""

    key: str
    value: Any
    origin: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    """Explicit settings in the order in which they apply, later ones on top."""

    entries: tuple[Entry, ...] = ()

    def over(self, origin: str, settings: Mapping[str, Any]) -> "Layers":
        """Return these layers with dotted `settings` on top."""
        added = (Entry(key, value, origin) for key, value in settings.items())
        return Layers(entries=(*self.entries, *added))

    def under(self, other: "Layers") -> "Layers":
        """Return these layers with `other` on top."""
        return Layers(entries=(*self.entries, *other.entries))

    def sets(self, key: str) -> bool:
        """Whether any of these layers sets `key`."""
        return any(entry.key == key for entry in self.entries)

    def to_list(self) -> list[list]:
        """Return plain JSON."""
        return [list(entry) for entry in self.entries]

    @classmethod
    def from_list(cls, entries: list[list]) -> "Layers":
        """Undo `to_list`."""
        return cls(entries=tuple(Entry(*entry) for entry in entries))


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML reads as something else."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema for plain scalars; no aliases."""

    yaml_implicit_resolvers: dict = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[1-9][0-9]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    for _each in (_Loader, _Dumper):
        _each.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def _values(node: yaml.Node, loader: _Loader, origin: str, depth: int = 0) -> Any:
    """Turn a YAML node into plain data; mappings become lists of (key, value, line) at any depth."""
    where = f"{origin}:{node.start_mark.line + 1}"
    if depth > MAX_DEPTH:
        raise ConfigError(f"{where}: a layer may be nested {MAX_DEPTH} deep; flatten it.")
    kind = node.tag.rpartition(":")[2]
    if not node.tag.startswith("tag:yaml.org,2002:") or kind not in (
        *("map", "seq", "str", "int", "float", "bool", "null"),
    ):
        raise ConfigError(f"{where}: the tag {node.tag} is not allowed; a layer is plain data.")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(_values(item, loader, origin, depth + 1)) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        found: list[Entry] = []
        seen: set[str] = set()
        if len(node.value) > MAX_KEYS:
            raise ConfigError(
                f"{where}: a mapping may have {MAX_KEYS} keys but has {len(node.value)}."
            )
        for key_node, value_node in node.value:
            line = f"{origin}:{key_node.start_mark.line + 1}"
            key = key_node.value
            if not isinstance(key, str):
                raise ConfigError(f"{line}: a key must be text but got a list or a mapping.")
            if key in seen:
                raise ConfigError(f"{line}: {key} is given twice; leave one out.")
            seen.add(key)
            found.append(Entry(key, _values(value_node, loader, origin, depth + 1), line))
        return found
    value = loader.construct_object(node)
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"{where}: {value!r} holds ${{, and interpolation is not done; write the value."
        )
    return value


def _is_mapping(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Entry)


def _plain(value: Any) -> Any:
    return {entry.key: _plain(entry.value) for entry in value} if _is_mapping(value) else value


def _flat(entries: list[Entry], prefix: str = "") -> Iterator[Entry]:
    """Yield dotted entries; the values of TABLES stay whole, since their own keys are dotted."""
    for entry in entries:
        key = prefix + entry.key
        if not _is_mapping(entry.value) or key.startswith(TABLES):
            yield Entry(key, _plain(entry.value), entry.origin)
        else:
            yield from _flat(entry.value, f"{key}.")


def _parse(text: str, origin: str) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else _values(node, loader, origin)
    except RecursionError as error:
        raise ConfigError(f"{origin}: nested too deep; a layer may be {MAX_DEPTH} deep.") from error
    except (yaml.YAMLError, ValueError, LookupError) as error:  # also of a tag that does not fit
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).split(";")[0]
        raise ConfigError(f"{origin}{line}: not valid YAML: {problem}.") from error


def find_layer(name: str) -> Path:
    """Return the file of a layer: as given, else under `conf/`, with or without `.yaml`."""
    for path in (Path(name), CONF / name, CONF / f"{name}.yaml"):
        if path.is_file():
            return path
    names = [path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")]
    near = get_close_matches(name, [*names, *(n.removesuffix(".yaml") for n in names)], 1)
    own = sorted(name.removesuffix(".yaml") for name in names if "/" not in name)
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    all_ = f"there are {', '.join(own)}, and more in the folders {', '.join(folders)}."
    hint = f"did you mean {near[0]}?" if near else all_
    raise ConfigError(f"the layer {name} is neither a file here nor under conf/; {hint}")


def read_layer(path: Path) -> Layers:
    """Read one YAML file.

    Raises:
        ConfigError: If it is no plain mapping in UTF-8 of at most a megabyte; with the line.
    """
    content = path.read_bytes()
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path} has {len(content)} bytes; a layer may have {MAX_BYTES}.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} must be UTF-8 text: {error}.") from error
    entries = _parse(text, str(path))
    if entries is not None and not _is_mapping(entries) and entries != []:
        raise ConfigError(
            f"{path} must hold `section: ...` or `key: value` lines but got {entries!r}."
        )
    return Layers(entries=tuple(_flat(entries or [])))


def read(arguments: list[str]) -> Layers:
    """Turn command-line arguments into layers: files, and `key=value` on top of all of them.

    The embedded default lies under them unless one of the files or overrides sets `data.source`.
    """
    given = Layers()
    for name in (a for a in arguments if "=" not in a):
        given = given.under(read_layer(find_layer(name)))
    for override in (a for a in arguments if "=" in a):
        key, _, text = override.partition("=")
        if not key.strip():
            raise ConfigError(f"an override is key=value but got {override!r}.")
        value = _parse(text, override)
        given = given.under(Layers(entries=tuple(_flat([Entry(key.strip(), value, "")]))))
    if given.sets("data.source"):
        return given
    return read_layer(DEFAULT_LAYER).under(given)


def _leaves(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of each dotted key of a dataclass."""
    found = {}
    hints = get_type_hints(schema)
    for part in fields(schema):
        hint = hints[part.name]
        if is_dataclass(hint):
            found |= _leaves(hint, f"{prefix}{part.name}.")
        else:
            found[prefix + part.name] = hint
    return found


def _say(hint: Any) -> str:
    if isinstance(hint, UnionType):
        return " or ".join(_say(part) for part in get_args(hint))
    if get_origin(hint) is tuple:
        return {float: "a list of numbers"}.get(get_args(hint)[0], "a list")
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    words |= {type(None): "null", dict: "a mapping", list: "a list of mappings"}
    return words.get(get_origin(hint) or hint, str(hint))


def _takes_text(hint: Any) -> bool:
    return hint is str or any(part is str for part in get_args(hint)) or get_origin(hint) is tuple


def _unknown(entry: Entry, known: dict[str, Any]) -> ConfigError:
    where = f"{entry.origin}: " if entry.origin else ""
    sections = [key for key in known if key.startswith(f"{entry.key}.")]
    if sections:
        return ConfigError(
            f"{where}{entry.key} is a section but got the value {entry.value!r}; "
            f"set one of its keys, such as {sections[0]}."
        )
    near = get_close_matches(entry.key, known, 1, cutoff=0.5)
    tops = dict.fromkeys(key.split(".")[0] for key in known)
    hint = f"did you mean {near[0]}?" if near else f"keys begin with {', '.join(tops)}."
    if f"sweep.{entry.key}".startswith(TABLES):
        hint = f"did you mean sweep.{entry.key}?"
    return ConfigError(f"{where}there is no key {entry.key}; {hint}")


def _resolve(schema: type[T], entries: tuple[Entry, ...]) -> T:
    known = _leaves(schema)
    tables = {key for key, hint in known.items() if get_origin(hint) is dict}
    node = OmegaConf.structured(schema)
    for part in {
        key.rpartition(".")[0] for key in known
    }:  # read-only, since the classes are frozen
        OmegaConf.set_readonly(OmegaConf.select(node, part) if part else node, False)
    filled: dict[str, dict[str, Any]] = {key: {} for key in tables}
    for entry in entries:
        where = f"{entry.origin}: " if entry.origin else ""
        if isinstance(entry.value, str):
            check_text(f"{where}{entry.key}", entry.value)
        table = next((key for key in tables if entry.key.startswith(f"{key}.")), None)
        if table is not None:
            filled[table][entry.key.removeprefix(f"{table}.")] = entry.value
            continue
        if entry.key not in known:
            if (
                entry.value is None
                and entry.origin
                and any(key.startswith(f"{entry.key}.") for key in known)
            ):
                continue  # a section of a layer whose keys are all commented out
            raise _unknown(entry, known)
        if entry.value in (None, [], {}) and entry.key in tables:
            filled[entry.key].clear()  # `sweep.space={}` empties what layers below filled
            continue
        value = entry.value
        if get_origin(known[entry.key]) is list and value is not None:
            value = _resolve_list(get_args(known[entry.key])[0], f"{where}{entry.key}", value)
        try:
            if isinstance(value, str) and not _takes_text(known[entry.key]):
                raise ValueError("OmegaConf would read 010, or 1_000, as a number")
            if bool in (known[entry.key], *get_args(known[entry.key])) and type(value) is int:
                raise ValueError("OmegaConf would read 2 as true")
            OmegaConf.update(node, entry.key, value, merge=False)
        except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
            raise ConfigError(
                f"{where}{entry.key} must be {_say(known[entry.key])} but got {entry.value!r}."
            ) from error
    for key, table in filled.items():
        kept = {name: value for name, value in table.items() if value is not None}
        OmegaConf.update(node, key, kept, merge=False)
    try:
        return OmegaConf.to_object(node)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} must be given but is not.") from error


def _resolve_list(schema: type[T], what: str, items: Any) -> list[T]:
    """Resolve a list of mappings, each into a dataclass."""
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise ConfigError(f"{what} must be a list of mappings but got {items!r}.")
    found = []
    for k, item in enumerate(items):
        try:
            found.append(_resolve(schema, tuple(Entry(key, v, "") for key, v in item.items())))
        except ConfigError as error:
            raise ConfigError(f"{what}[{k}]: {error}") from error
    return found


def build(layers: Layers, schema: type[T] = Config) -> T:
    """Resolve layers into a dataclass.

    Args:
        layers: Explicit settings.
        schema: `Config`, under which the method's preset is laid and in which the sections of a sweep are
            passed over; or another dataclass, which takes its own sections and leaves the rest.

    Raises:
        ConfigError: If a key is unknown, a value has another type or lies outside its range, or what makes
            the method is contradicted.
    """
    if schema is not Config:
        own = tuple(part.name for part in fields(schema))
        return _resolve(schema, tuple(e for e in layers.entries if e.key.split(".")[0] in own))
    entries = tuple(e for e in layers.entries if e.key.split(".")[0] not in SWEEP_SECTIONS)
    names = [entry.value for entry in entries if entry.key == "method.name"]
    name = names[-1] if names else Method().name
    preset = methods.get(name if isinstance(name, str) else repr(name))
    beneath = tuple(Entry(key, value, "") for key, value in preset.settings.items())
    config = _resolve(Config, beneath + entries)
    shown = flatten(to_dict(config))
    for key in preset.fixed:
        if shown[key] != preset.settings[key]:
            raise ConfigError(
                f"method.name={name} means {key}={scalar(preset.settings[key])} but got {scalar(shown[key])}; leave it out, "
                "or use another method, such as richkd-l."
            )
    if (
        "loss.logit" in preset.fixed
        and preset.settings["loss.feature"] > shown["loss.feature"] == 0
    ):
        raise ConfigError(
            f"method.name={name} learns features alone but got loss.feature=0; leave it out, or use method.name=ce."
        )
    return config


def mistakes(layers: Layers, make: Callable[[Layers], Any] = build) -> tuple[Layers, list[str]]:
    """Return every mistake in layers, a line each, and the layers without them.

    `make` names one at a time: the entry that it stumbles over is taken out until it succeeds. What is wrong only because
    an entry was taken out, such as a mean without its deviation, is no mistake of its own.

    Args:
        layers: Explicit settings.
        make: Makes something of them, or raises ConfigError. If no entry is to blame, it still does in the end.
    """
    found: list[str] = []
    out: set[str] = set()
    while (said := _refused(layers, make)) is not None:
        # those that the message names come first, the last of them foremost
        for entry in sorted(layers.entries[::-1], key=lambda e: not _named(_bare(e.key), said)):
            others = tuple(each for each in layers.entries if each is not entry)
            if _refused(Layers(entries=others), make) != said:
                break
        else:
            return layers, found or [said]
        if not any(_named(key, said) for key in out - {_bare(entry.key)}):
            where = f"{entry.origin}: " if entry.origin and entry.origin not in said else ""
            found.append(where + said)
        out.add(_bare(entry.key))
        layers = Layers(entries=others)
    return layers, found


def _refused(layers: Layers, make: Callable[[Layers], Any]) -> str | None:
    try:
        make(layers)
    except ConfigError as error:
        return str(error)
    return None


def _bare(key: str) -> str:
    """Return a key as messages name it: one of TABLES by itself."""
    return key.removeprefix(TABLES[0]).removeprefix(TABLES[1])


def _named(key: str, said: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", said) is not None


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as nested plain data."""
    return asdict(config)


def from_dict(nested: dict[str, Any]) -> Config:
    """Undo `to_dict`, with all checks."""
    return build(Layers().over("", flatten(nested)))


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested plain data by dotted key."""
    found = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and not f"{prefix}{key}".startswith(TABLES):
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def dump(config: Any) -> str:
    """Return a config as YAML that `read_layer` reads back."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def words(config: Config) -> list[str]:
    """Return the `key=value` words that `read` and `build` turn into this config, but for where its runs are kept.

    What goes without saying is left out: a value that method and source bring along. The source is always said, so
    that the embedded default does not lie beneath.
    """
    wanted = flatten(to_dict(config))
    said = {key: wanted[key] for key in ("method.name", "data.source")}
    beneath = flatten(to_dict(build(Layers().over("", said))))
    differing = {
        key: value
        for key, value in wanted.items()
        if value != beneath[key] and key not in ("storage", "cache")
    }
    return [f"{key}={scalar(value)}" for key, value in (said | differing).items()]


def scalar(value: Any) -> str:
    """Return a value as YAML in one line, such as an override holds."""
    text = yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=math.inf
    )
    return text[1:-2]  # in a list, since by itself text would be followed by the end of a document


def brief(value: Any, digits: int = 3) -> str:
    """Return a setting in few characters: a fraction with so many digits, what is whole with all of its own."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.{digits}g}"
    if isinstance(value, dict | list | tuple):
        return scalar(list(value) if isinstance(value, tuple) else value)
    return "-" if value is None else str(value)


def command_of(
    config: Config, *, threads: int | None = None, workers: int = 1, name: str | None = None
) -> str:
    """Return the line for a shell that runs this config again.

    Args:
        config: The run.
        threads: Of the CPU, as its `run.json` has them: the last bits depend on their number. None: not said.
        workers: That trained it.
        name: Of the new run; None: one after method, seed and time.
    """
    line = ["python", "-m", *(("richkd", "distill") if workers == 1 else ("tune", "train"))]
    line += words(config)
    if workers > 1:
        line.append(f"resources.workers={workers}")
    if name is not None:
        line += ["--name", name]
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join(line)


def digest(config: Config) -> str:
    """Return 12 hexadecimal digits that change with everything that changes a result."""
    kept = {k: v for k, v in flatten(to_dict(config)).items() if k not in UNHASHED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]
