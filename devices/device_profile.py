"""Device profiles: what a device offers to a model, every number with unit, source, date and trust. Torch-free.

A profile is a YAML file (`profiles/*.yaml` here, or the user's own under `$XDG_CONFIG_HOME/dwindle/devices`):

    name, title
    memory          physical; and what one app may use of it: default, pessimistic and, where the system has such a
                    thing, entitled
    bandwidth       peak of the memory
    storage         optional: what a model file is read with
    compute_units   name -> effective_compute (what prefill reaches, not a data sheet's peak), bandwidth_share (what
                    decode reaches of the peak), overhead (per token, independent of the model's size),
                    sustained (rate after minutes of work / rate at the start) and, optional, decode_compute (what
                    unpacking integers or palettes token by token reaches; a floor under decode on CPUs),
                    attention_compute (what attention to the cache reaches), layer_overhead (per token and layer),
                    cache_bandwidth and cache (at what rate weights are read that such a cache holds)
    runtimes        name (`onnx`, `coreml`, `coreai`: an Artifact's format) -> compute unit, minimum_os, weight_formats:
                    a list, or OS version -> what that version adds, the first being minimum_os

Files are read strictly: every problem is found before one error is raised, unknown keys name the nearest known one,
and a unit of the wrong dimension is refused. `host` is not a file: host_profile.py measures it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dwindle.devices.quantity import Dimension, Quantity, read_quantity
from dwindle.errors import RecipeError, did_you_mean
from dwindle.storage import write_text

__all__ = [
    "FLOAT_FORMATS",
    "WEIGHT_FORMATS",
    "ComputeUnit",
    "DeviceProfile",
    "Memory",
    "Runtime",
    "add_profile",
    "check_profile",
    "list_profiles",
    "load_profile",
    "profile_files",
    "user_folder",
]

HOST = "host"

FLOAT_FORMATS = ("float32", "float16", "bfloat16")
"""What an exporter converts to the float its runtime computes in; a profile that takes one of them takes all."""

WEIGHT_FORMATS = (
    *FLOAT_FORMATS,
    *(f"palette{bits}" for bits in (1, 2, 3, 4, 6, 8)),
    *(f"int{bits}" for bits in range(2, 9)),
)
"""How a layer's weights can be stored, as an artifact's `details.layers[name].format` and a profile name them."""

_OPTIONAL: Mapping[str, Dimension] = {
    "decode_compute": "compute", "attention_compute": "compute", "layer_overhead": "time",
    "cache_bandwidth": "bandwidth", "cache": "memory",
}  # fmt: skip
"""What a compute unit may have, too, and its dimension."""
_BUILT_IN = Path(__file__).parent / "profiles"
_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Memory:
    """Physical memory and the part one app may use. `entitled` is None where no such permission exists."""

    physical: Quantity
    default: Quantity
    pessimistic: Quantity
    entitled: Quantity | None = None


@dataclass(frozen=True)
class ComputeUnit:
    """One engine of the device: what it reaches in practice."""

    effective_compute: Quantity
    """FLOP/s that prefill reaches (2 per multiply-accumulate)."""
    bandwidth_share: Quantity
    """Share of the peak bandwidth that decode reaches, per-token overhead apart."""
    overhead: Quantity
    """Seconds per token that do not depend on the model's size."""
    sustained: Quantity
    """Decode rate after minutes of work as a share of the first seconds' rate."""
    decode_compute: Quantity | None = None
    """FLOP/s that decode reaches with packed weights, where unpacking them may be slower than reading them."""
    attention_compute: Quantity | None = None
    """FLOP/s that decode reaches in attention, where computing it may be slower than reading the KV cache."""
    layer_overhead: Quantity | None = None
    """Seconds per token and decoder layer that depend on nothing else, on top of `overhead`."""
    cache_bandwidth: Quantity | None = None
    """Bytes per second of weights that the processor's cache holds from token to token."""
    cache: Quantity | None = None
    """Bytes up to which it holds them."""


@dataclass(frozen=True)
class Runtime:
    """What runs an artifact's format here: on which unit, from which OS on, with which weight formats.

    `weight_formats` are those of the newest OS; `formats_by_os` says which version added which.
    """

    unit: str
    minimum_os: str
    weight_formats: tuple[str, ...]
    formats_by_os: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class DeviceProfile:
    """One device: `load_profile` makes it from YAML, `host_profile.measure_profile` from this machine."""

    name: str
    title: str
    memory: Memory
    bandwidth: Quantity
    compute_units: Mapping[str, ComputeUnit]
    runtimes: Mapping[str, Runtime]
    storage: Quantity | None = None

    def quantities(self) -> dict[str, Quantity]:
        """Return every number of the profile under its dotted name, for display."""
        found = {f"memory.{k}": v for k, v in vars(self.memory).items() if v is not None}
        found["bandwidth"] = self.bandwidth
        if self.storage is not None:
            found["storage"] = self.storage
        for name, unit in self.compute_units.items():
            found |= {f"compute_units.{name}.{k}": v for k, v in vars(unit).items() if v is not None}
        return found


def user_folder() -> Path:
    """Return the folder of the user's own profiles, under XDG_CONFIG_HOME (or ~/.config)."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "dwindle" / "devices"


def list_profiles() -> tuple[str, ...]:
    """Return the names of all profiles: built-in ones, the user's own, then `host`."""
    return (*sorted(profile_files()), HOST)


def profile_files() -> dict[str, Path]:
    """Return name -> file of every built-in profile and the user's own; a built-in name comes first."""
    found = {path.stem: path for folder in (user_folder(), _BUILT_IN) for path in folder.glob("*.yaml")}
    return dict(sorted(found.items()))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """Return the profile of that name or file. Raises RecipeError: near names, or every problem of the file."""
    text = str(name_or_path)
    if text == HOST:
        from dwindle.devices.host_profile import measure_profile

        return measure_profile()
    if text.endswith((".yaml", ".yml")) or os.sep in text:
        return _load_file(Path(text))
    for folder in (_BUILT_IN, user_folder()):
        if (folder / f"{text}.yaml").is_file():
            return _load_file(folder / f"{text}.yaml")
    raise RecipeError(
        f"no device profile {text!r}{did_you_mean(text, list_profiles())}. "
        "Give the path of a YAML file, or add one with `dwindle devices add`."
    )


def check_profile(path: str | Path) -> list[str]:
    """Return every problem of a profile file; an empty list means it can be used."""
    return _read(Path(path))[1]


def add_profile(path: str | Path) -> Path:
    """Copy a checked profile into the user's folder under its own name and return the new path."""
    profile = _load_file(Path(path))
    if profile.name == HOST or (_BUILT_IN / f"{profile.name}.yaml").is_file():
        raise RecipeError(f"{path}: the name {profile.name!r} belongs to a built-in profile. Give yours another name.")
    place = user_folder() / f"{profile.name}.yaml"
    write_text(place, Path(path).read_text(encoding="utf-8"))
    return place


def _load_file(path: Path) -> DeviceProfile:
    profile, problems = _read(path)
    if profile is None:
        lines = "\n".join(f"  {p}" for p in problems)
        raise RecipeError(f"device profile {path}: {len(problems)} problem(s):\n{lines}")
    return profile


def _read(path: Path) -> tuple[DeviceProfile | None, list[str]]:
    from dwindle.strict_yaml import read_yaml

    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        return None, [f"cannot be read: {error.strerror}"]
    except ValueError as error:
        return None, [f"is not YAML: {error}"]
    if not isinstance(data, Mapping):
        return None, ["is not a mapping of name, title, memory, bandwidth, compute_units and runtimes"]
    problems: list[str] = []
    profile = _profile(data, problems)
    return (None if problems else profile), problems


def _section(data: Any, where: str, keys: Mapping[str, bool], problems: list[str]) -> Mapping[str, Any]:
    """Return `data` as a mapping after checking its keys (name -> required?)."""
    if not isinstance(data, Mapping):
        problems.append(f"{where}: found {data!r}, needed an object with {', '.join(keys)}")
        return {}
    prefix = f"{where}." if where else ""
    problems += [f"{prefix}{k}: unknown key{did_you_mean(str(k), keys)}" for k in data if k not in keys]
    problems += [f"{prefix}{k}: missing" for k, required in keys.items() if required and k not in data]
    return {k: v for k, v in data.items() if k in keys}


def _named(data: Any, where: str, problems: list[str]) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not data:
        problems.append(f"{where}: needed at least one entry")
        return {}
    return data


def _profile(raw: Mapping[str, Any], problems: list[str]) -> DeviceProfile | None:
    top = ("name", "title", "memory", "bandwidth", "compute_units", "runtimes")
    data = _section(raw, "", {**dict.fromkeys(top, True), "storage": False}, problems)
    if "name" in data and not (isinstance(data["name"], str) and _NAME.fullmatch(data["name"])):
        problems.append(f"name: {data['name']!r} is not lower-case words joined by '-'")
    if "title" in data and not isinstance(data["title"], str):
        problems.append(f"title: {data['title']!r} is not text")
    memory = _memory(data["memory"], problems) if "memory" in data else None
    bandwidth = read_quantity(data["bandwidth"], "bandwidth", "bandwidth", problems) if "bandwidth" in data else None
    storage = read_quantity(data["storage"], "storage", "bandwidth", problems) if "storage" in data else None
    units = {
        str(name): _compute_unit(value, f"compute_units.{name}", problems)
        for name, value in (
            _named(data["compute_units"], "compute_units", problems) if "compute_units" in data else {}
        ).items()
    }
    runtimes = {
        str(name): _runtime(value, f"runtimes.{name}", tuple(units), problems)
        for name, value in (_named(data["runtimes"], "runtimes", problems) if "runtimes" in data else {}).items()
    }
    if problems or memory is None or bandwidth is None:
        return None
    return DeviceProfile(
        data["name"],
        data["title"],
        memory,
        bandwidth,
        {k: v for k, v in units.items() if v},
        {k: v for k, v in runtimes.items() if v},
        storage,
    )


def _memory(raw: Any, problems: list[str]) -> Memory | None:
    data = _section(
        raw, "memory", {"physical": True, "default": True, "pessimistic": True, "entitled": False}, problems
    )
    read = {k: read_quantity(v, f"memory.{k}", "memory", problems) for k, v in data.items()}
    physical = read.get("physical")
    if physical is None:
        return None
    problems += [f"memory.{k}: more than memory.physical" for k, v in read.items() if v and v.at() > physical.at()]
    default, pessimistic = read.get("default"), read.get("pessimistic")
    return Memory(physical, default, pessimistic, read.get("entitled")) if default and pessimistic else None


def _compute_unit(raw: Any, where: str, problems: list[str]) -> ComputeUnit | None:
    needed = ("effective_compute", "bandwidth_share", "overhead", "sustained")
    data = _section(raw, where, {**dict.fromkeys(needed, True), **dict.fromkeys(_OPTIONAL, False)}, problems)
    compute = read_quantity(data.get("effective_compute"), f"{where}.effective_compute", "compute", problems)
    share = read_quantity(data.get("bandwidth_share"), f"{where}.bandwidth_share", "share", problems)
    overhead = read_quantity(data.get("overhead"), f"{where}.overhead", "time", problems)
    sustained = read_quantity(data.get("sustained"), f"{where}.sustained", "share", problems)
    more = {
        name: read_quantity(data[name], f"{where}.{name}", dimension, problems)
        for name, dimension in _OPTIONAL.items()
        if name in data
    }
    if ("cache" in more) != ("cache_bandwidth" in more):
        problems.append(f"{where}: cache and cache_bandwidth say something together only; give both or neither")
    if not (compute and share and overhead and sustained):
        return None
    return ComputeUnit(compute, share, overhead, sustained, **more)


def _runtime(raw: Any, where: str, units: tuple[str, ...], problems: list[str]) -> Runtime | None:
    data = _section(raw, where, {"unit": True, "minimum_os": True, "weight_formats": True}, problems)
    if len(data) < 3:
        return None
    before = len(problems)
    if data["unit"] not in units:
        problems.append(f"{where}.unit: {data['unit']!r} is no compute unit{did_you_mean(str(data['unit']), units)}")
    if not isinstance(data["minimum_os"], str):
        problems.append(f"{where}.minimum_os: {data['minimum_os']!r} is not text")
    added = _formats_by_os(data["weight_formats"], where, str(data["minimum_os"]), problems)
    if len(problems) > before:
        return None
    newest = tuple(dict.fromkeys(f for formats in added.values() for f in formats))
    return Runtime(data["unit"], data["minimum_os"], newest, added)


def _formats_by_os(raw: Any, where: str, minimum_os: str, problems: list[str]) -> Mapping[str, tuple[str, ...]]:
    """Return OS version -> the weight formats it adds, from a list (all from minimum_os on) or a mapping."""
    by_os = {str(k): v for k, v in raw.items()} if isinstance(raw, Mapping) else {minimum_os: raw}
    if by_os and next(iter(by_os)) != minimum_os:
        problems.append(f"{where}.weight_formats: starts with {next(iter(by_os))!r}, needed minimum_os {minimum_os!r}")
    for version, formats in by_os.items():
        place = f"{where}.weight_formats" + (f".{version}" if isinstance(raw, Mapping) else "")
        if not isinstance(formats, list) or not formats:
            problems.append(f"{place}: needed a list of {', '.join(WEIGHT_FORMATS)}")
            by_os[version] = []
            continue
        problems += [
            f"{place}: {f!r} is unknown{did_you_mean(str(f), WEIGHT_FORMATS)}"
            for f in formats
            if f not in WEIGHT_FORMATS
        ]
    if not by_os:
        problems.append(f"{where}.weight_formats: needed a list of {', '.join(WEIGHT_FORMATS)}")
    return {version: tuple(str(f) for f in formats) for version, formats in by_os.items()}
