from __future__ import annotations

from pathlib import Path

import pytest

from dwindle.devices import host_kernels, host_profile
from dwindle.devices.device_profile import add_profile, check_profile, list_profiles, load_profile, profile_files
from dwindle.errors import RecipeError

BUILT_IN = list_profiles()[:-1]
ASKED_FOR = (
    *("iphone-13-pro", "iphone-14-pro", "iphone-15-pro", "iphone-16-pro", "iphone-17-pro"),
    *(f"ipad-m{generation}" for generation in range(1, 6)),
    *(f"mac-m{generation}{kind}" for generation in range(1, 6) for kind in ("", "-pro", "-max")),
    *("pixel-8", "pixel-9", "pixel-10", "galaxy-s24", "galaxy-s25", "galaxy-s26", "oneplus-12", "raspberry-pi-5"),
    *("laptop-ddr4", "laptop-ddr5", "laptop-lpddr5x", "laptop-lunar-lake", "laptop-strix-halo"),
)


def test_the_devices_that_people_have_are_built_in() -> None:
    assert set(ASKED_FOR) <= set(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_profiles_are_whole(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    assert profile.memory.pessimistic.at() <= profile.memory.default.at() <= profile.memory.physical.at()
    for where, quantity in profile.quantities().items():
        assert quantity.at("low") <= quantity.at() <= quantity.at("high"), where
        assert len(quantity.source) > 5, where
    assert all(runtime.unit in profile.compute_units for runtime in profile.runtimes.values())
    assert profile.storage is not None
    assert profile.memory.entitled is None or profile.memory.entitled.at() >= profile.memory.default.at()
    assert (profile.memory.entitled is None) == (not name.startswith(("iphone", "ipad", "mac")))
    for runtime in profile.runtimes.values():
        assert next(iter(runtime.formats_by_os)) == runtime.minimum_os
    for unit in profile.compute_units.values():
        assert unit.decode_compute is None or unit.decode_compute.at() <= unit.effective_compute.at()


def test_list_names_built_in_own_and_host(toaster: Path) -> None:
    assert list_profiles() == (*BUILT_IN, "host")
    add_profile(toaster)
    assert list_profiles() == (*sorted((*BUILT_IN, "toaster-2")), "host")
    assert profile_files()["toaster-2"].parent != profile_files()["pixel-9"].parent


def test_add_then_load_by_name(toaster: Path, own_configuration: Path) -> None:
    place = add_profile(toaster)
    assert place == own_configuration / "dwindle" / "devices" / "toaster-2.yaml"
    assert load_profile("toaster-2") == load_profile(toaster)


def test_a_built_in_name_is_taken(toaster: Path) -> None:
    toaster.write_text(toaster.read_text().replace("toaster-2", "pixel-9"))
    with pytest.raises(RecipeError, match="belongs to a built-in profile"):
        add_profile(toaster)


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'iphone-15-pro'"):
        load_profile("iphone15pro")


def test_every_fault_at_once(toaster: Path) -> None:
    text = toaster.read_text()
    text = text.replace("name: toaster-2", "name: Toaster Two").replace(
        "bandwidth: {value: 10, unit: GB/s", "bandwidth: {value: 10, unit: GB"
    )
    text = text.replace("unit: cpu", "unit: gpu").replace("int4]", "int9]").replace("memory:", "memmory:")
    text = text.replace("    sustained:", "    sustaned:")
    toaster.write_text(text)
    problems = "\n".join(check_profile(toaster))
    for said in ("lower-case words", "'GB' is no unit of bandwidth", "'gpu' is no compute unit", "'int9' is unknown",
                 "memmory: unknown key (did you mean 'memory'?)", "memory: missing",
                 "compute_units.cpu.sustaned: unknown key (did you mean 'sustained'?)"):  # fmt: skip
        assert said in problems
    with pytest.raises(RecipeError, match=r"problem\(s\)"):
        load_profile(toaster)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("title: Toaster 2", "title: 2", "title: 2 is not text"),
        ("minimum_os: ToastOS 3", "minimum_os: 3", "minimum_os: 3 is not text"),
        ("[float32, int4]", "[]", "needed a list of"),
        ("default: {value: 500", "default: {value: 5000", "memory.default: more than memory.physical"),
        ("  onnx: {unit: cpu, minimum_os: ToastOS 3, weight_formats: [float32, int4]}", "", "at least one entry"),
        ("memory:\n", "memory: 3\nmemory2:\n", "memory: found 3"),
    ],
)
def test_single_faults(toaster: Path, old: str, new: str, said: str) -> None:
    text = toaster.read_text()
    assert old in text
    toaster.write_text(text.replace(old, new))
    assert said in "\n".join(check_profile(toaster))


def test_files_that_are_no_profile(tmp_path: Path) -> None:
    assert "cannot be read" in check_profile(tmp_path / "none.yaml")[0]
    for text, said in (("a: [", "not YAML"), ("- 1", "not a mapping")):
        (tmp_path / "x.yaml").write_text(text)
        assert said in check_profile(tmp_path / "x.yaml")[0]


def test_a_good_file_has_no_problems(toaster: Path) -> None:
    assert check_profile(toaster) == []


def test_host_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller matrices than usual and in shorter turns, to be quick on a machine that is busy."""
    monkeypatch.setattr(host_kernels, "_READ", ((64, 96, 1), (64, 96, 3), (256, 512, 4)))
    monkeypatch.setattr(host_kernels, "_WIDTH", 256)
    monkeypatch.setattr(host_kernels, "_FFN", 512)
    monkeypatch.setattr(host_kernels, "_BLOCK_SECONDS", 0.002)
    monkeypatch.setattr(host_profile, "_COPY_BYTES", 2**22)
    host_profile.measure_profile.cache_clear()
    host = load_profile("host")
    host_profile.measure_profile.cache_clear()
    assert host.bandwidth.trust == "measured"
    assert 0.2e9 < host.bandwidth.at() < 5e12
    assert host.memory.physical.at() >= host.memory.default.at() > 0
    assert list(host.runtimes) == ["onnx"]
    assert host.storage is not None
    unit = host.compute_units["cpu"]
    assert unit.bandwidth_share.trust == "measured"
    measured = (unit.decode_compute, unit.attention_compute, unit.layer_overhead)
    assert all(q is not None and q.trust == "measured" and q.at("low") <= q.at() <= q.at("high") for q in measured)
    assert 0 <= unit.overhead.at() < 0.1  # what is left without layers: nothing, where others take turns on the cores
    assert (unit.cache is None) == (unit.cache_bandwidth is None)
    assert 0 < unit.bandwidth_share.at("low") <= unit.bandwidth_share.at() <= unit.bandwidth_share.at("high") <= 1


def test_host_without_a_runtime_has_no_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_kernels, "find_spec", lambda name: None)
    monkeypatch.setattr(host_profile, "_COPY_BYTES", 2**22)
    host = host_profile.measure_profile.__wrapped__()
    assert host.compute_units["cpu"].decode_compute is None
    assert host.compute_units["cpu"].effective_compute.trust == "derived"


def test_formats_per_version_of_the_system(toaster: Path) -> None:
    text = toaster.read_text()
    by_version = "weight_formats: {ToastOS 3: [float32], ToastOS 4: [int4, int8]}"
    toaster.write_text(text.replace("weight_formats: [float32, int4]", by_version))
    runtime = load_profile(toaster).runtimes["onnx"]
    assert runtime.formats_by_os == {"ToastOS 3": ("float32",), "ToastOS 4": ("int4", "int8")}
    assert runtime.weight_formats == ("float32", "int4", "int8")


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        ("{ToastOS 2: [float32]}", "starts with 'ToastOS 2', needed minimum_os 'ToastOS 3'"),
        ("{ToastOS 3: [int9]}", r"weight_formats.ToastOS 3: 'int9' is unknown"),
        ("{ToastOS 3: []}", "weight_formats.ToastOS 3: needed a list of"),
        ("{}", "weight_formats: needed a list of"),
    ],
)
def test_faulty_formats_per_version(toaster: Path, formats: str, said: str) -> None:
    toaster.write_text(toaster.read_text().replace("[float32, int4]", formats))
    assert said in "\n".join(check_profile(toaster))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("compute_units:", "storage: 3\ncompute_units:", "storage: found 3"),
        ("    overhead:", "    decode_compute: {value: 3}\n    overhead:", "cpu.decode_compute.unit: missing"),
        (
            "    overhead:",
            "    cache: {value: 3}\n    overhead:",
            "cpu: cache and cache_bandwidth say something together",
        ),
    ],
)
def test_faulty_optional_numbers(toaster: Path, old: str, new: str, said: str) -> None:
    toaster.write_text(toaster.read_text().replace(old, new))
    assert said in "\n".join(check_profile(toaster))
