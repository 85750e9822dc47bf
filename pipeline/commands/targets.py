"""Commands about targets: devices, bench, validate, doctor. None of them loads torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from dwindle.pipeline import figures
from dwindle.pipeline.commands.shared import emit, json_option, made_options, notify, split_settings

__all__ = ["bench", "devices", "doctor", "validate"]


@click.group()
def devices() -> None:
    """List, show, check or add device profiles; every number in one has a source and a date."""


@devices.command("list")
@json_option
def list_devices(as_json: bool) -> None:
    """Name the profiles that are known here."""
    from dwindle.devices import list_profiles, load_profile

    rows = [{"name": name, "title": load_profile(name).title} for name in list_profiles() if name != "host"]
    rows.append({"name": "host", "title": "This machine, measured"})
    emit({"devices": rows}, "\n".join(f"{row['name']:18} {row['title']}" for row in rows), as_json)


@devices.command("show")
@click.argument("name")
@json_option
def show_device(name: str, as_json: bool) -> None:
    """Show every number of a profile with unit, source, date and trust, and what others published of the device."""
    from dwindle.devices import load_profile
    from dwindle.devices.published import published_on

    profile = load_profile(name)
    lines = [f"{profile.name}: {profile.title}"]
    for label, quantity in profile.quantities().items():
        lines.append(
            f"  {label:38} {quantity.value:g} {quantity.unit}  [{quantity.trust}, {quantity.date}] {quantity.source}"
        )
    for label, runtime in profile.runtimes.items():
        formats = "; ".join(f"from {version} on {', '.join(new)}" for version, new in runtime.formats_by_os.items())
        lines.append(f"  {f'runtimes.{label}':38} on {runtime.unit}, {formats}")
    rows = published_on(profile.name)
    lines += [f"  published  {row.text}  [{row.trust}, {row.date}] {row.source}" for row in rows]
    emit({**dataclasses.asdict(profile), "published": [dataclasses.asdict(row) for row in rows]}, "\n".join(lines),
         as_json)  # fmt: skip


@devices.command("check")
@click.argument("path", type=click.Path(), required=False)
@json_option
def check_device(path: str | None, as_json: bool) -> int:
    """Check one profile file, or every known profile and how well the cost model predicts published measurements.

    Exit code 2 with every problem if a profile is not sound.
    """
    from dwindle.devices import calibrate, check_profile
    from dwindle.devices.device_profile import profile_files

    if path is not None:
        problems = check_profile(path)
        told = "\n".join(f"{path}: {problem}" for problem in problems)
        emit({"path": path, "problems": problems}, told or f"{path}: sound", as_json)
        return 2 if problems else 0
    files = profile_files()
    found = {name: problems for name, file in files.items() if (problems := check_profile(file))}
    calibration = calibrate()
    lines = [f"{files[name]}: {problem}" for name, problems in found.items() for problem in problems]
    lines.append(f"{len(files) - len(found)} of {len(files)} profiles sound")
    emit({"profiles": len(files), "problems": found, "calibration": calibration.to_json()},
         "\n".join([*lines, calibration.text()]), as_json)  # fmt: skip
    return 2 if found else 0


@devices.command("add")
@click.argument("path", type=click.Path())
@json_option
def add_device(path: str, as_json: bool) -> None:
    """Check a profile file and copy it to the user's profiles, so that its name is known."""
    from dwindle.devices import add_profile

    place = add_profile(path)
    emit({"path": str(place)}, f"Added: {place}", as_json)


@click.command()
@click.argument("artefact", type=click.Path())
@click.option(
    "--on",
    "target",
    default="host",
    show_default=True,
    metavar="TARGET",
    help="host, ssh://user@board[:port], adb:SERIAL, apple:NAME, apple:mac or aihub:DEVICE.",
)
@click.option("--profile", help="Device profile that TARGET is: its estimates are replaced by this measurement.")
@click.option("--runtime", help="onnxruntime, genai, coreai or coreml.  [default: by the artefact's format]")
@click.option("--prompt-tokens", help="Tokens before the first generated one.  [default: 512]")
@click.option("--decode-tokens", help="Tokens generated per repeat.  [default: 128]")
@click.option("--repeats", help="Runs after one to warm up; the median counts.  [default: 5]")
@click.option("--threads", help="Threads of the runtime.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other option: context, warm_up, timeout_seconds, development_team; repeat.",
)
@click.option("--identity", help="ssh: private key to log in with.")
@click.option("--known-hosts", help="ssh: file of known host keys.")
@click.option("--python", help="ssh, adb: Python on the target that has the runtime.  [default: python3]")
@click.option("--runner", help="adb: a program for the phone that speaks the runner's protocol.")
@json_option
def bench(artefact: str, target: str, profile: str | None, settings: tuple[str, ...], as_json: bool,
          **values: str | None) -> int:  # fmt: skip
    """Measure an exported folder on TARGET: tokens/s, time to first token, load time, peak memory.

    An artefact inside a run folder leaves its measurement there, and `dwindle validate` uses it. What came before a
    target went away is kept and marked; the exit code is then 2.
    """
    from dwindle import devices as room

    own, _ = split_settings(settings, values)
    options = made_options(room.BenchOptions, {**values, **own}, "bench")
    if profile is not None and profile != "host":
        room.load_profile(profile)
    notify(f"measuring {artefact} on {target}")
    found = room.measure(Path(artefact), target, options, profile=profile, heard=_tell)
    run = room.run_of(artefact)
    place = room.write_measurement(found, run) if run is not None else None
    lines = [f"{m.name:30} {_told(m)}" for m in found.metrics().values()]
    lines += [f"note: {note}" for note in found.notes]
    lines += [f"Written: {place}"] if place else []
    emit({**found.to_json(), "written": str(place) if place else None}, "\n".join(lines), as_json)
    if not found.complete:
        click.echo(f"INCOMPLETE: {len(found.repeats)} of {found.protocol.repeats} repeats: {found.stopped}", err=True)
    return 0 if found.complete else 130 if found.stopped == room.INTERRUPTED else 2


def _tell(event: Any) -> None:
    """Say how far a measurement is."""
    if event["event"] == "repeat":
        seconds = event["token_seconds"]
        notify(f"repeat {event['index'] + 1}: {len(seconds) / sum(seconds):.4g} tokens/s after "
               f"{event['first_token_seconds']:.3g} s")  # fmt: skip
    elif event["event"] == "note":
        notify(event["note"])


def _told(metric: Any) -> str:
    """Return a metric's value, how it is known, and its range."""
    value = "not known" if metric.value is None else figures.metric_text(metric, metric.value)
    return f"{value} ({', '.join(part for part in (metric.basis, figures.metric_range(metric)) if part)})"


@click.command()
@click.argument("folder", metavar="RUN", type=click.Path())
@click.option("--target", "targets", multiple=True, help="Device profile; repeat.  [default: the run's recipe]")
@click.option("--budget", "budgets", multiple=True, metavar="LIMIT", help="As in 'tokens_per_second >= 30'; repeat.")
@click.option("--budgets", "file", help="YAML file of such limits.  [default: the run's recipe, with no --budget]")
@click.option("--require", help="measured: an estimate does not meet a budget.")
@click.option("--junit", type=click.Path(), help="Also write the JUnit XML here, besides RUN/validation.xml.")
@json_option
def validate(folder: str, targets: tuple[str, ...], budgets: tuple[str, ...], file: str | None, require: str | None,
             junit: str | None, as_json: bool) -> int:  # fmt: skip
    """Hold the artifacts of RUN to budgets on device profiles; exit 1 if one is missed.

    Writes RUN/validation.json and RUN/validation.xml (JUnit). Measurements that RUN keeps replace estimates.
    """
    from dwindle import devices as room
    from dwindle.pipeline.measured_report import recipe_values
    from dwindle.pipeline.write_reports import read_report
    from dwindle.report import Report
    from dwindle.storage import write_json, write_text

    run = read_report(Path(folder))
    values = recipe_values(Path(folder))
    limits = room.parse_budgets(budgets) and list(budgets)
    if file is not None:
        found = room.read_budgets(file)
        limits = [*limits, *([f"{k} {v}" for k, v in found.items()] if isinstance(found, dict) else found)]
    given: dict[str, Any] = {"targets": targets, "budgets": tuple(limits), "require": require}
    values |= {key: value for key, value in given.items() if value}
    options = made_options(room.ValidateOptions, values, "validate")
    verdicts, skipped = room.run(options, [(a, Path(folder) / a.path) for a in run.artifacts], steps=run.steps,
                                 folder=Path(folder))  # fmt: skip
    report = Report(artifacts=run.artifacts, targets=verdicts, skipped=skipped)
    write_json(Path(folder) / "validation.json", report.to_json())
    for place in (Path(folder) / "validation.xml", *([Path(junit)] if junit else [])):
        write_text(place, room.junit(report))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, allow_nan=False))
    else:
        click.echo("\n".join(_verdict_lines(verdicts, skipped)))
    for line in report.failures:
        click.echo(f"FAILED {line}", err=True)
    return report.exit_code


def _verdict_lines(verdicts: Any, skipped: Any) -> list[str]:
    """Return a line per target and artifact with its verdict, and below it one per metric with value and basis.

    What others published of the device, of other models, follows for reference: it decides nothing.
    """
    from dwindle.devices.published import published_on

    lines = []
    for number, target in enumerate(verdicts):
        verdict = {True: "passed", False: "FAILED", None: "no budget"}[target.passed]
        lines.append(f"{target.profile}: {verdict}{f'  ({target.artifact})' if target.artifact else ''}")
        for metric in target.metrics:
            held = {True: f"  ok: {metric.budget}", False: f"  MISSED: {metric.budget}", None: ""}[metric.passed]
            lines.append(f"  {metric.name:32} {_told(metric)}{held}")
        if number + 1 == len(verdicts) or verdicts[number + 1].profile != target.profile:
            lines += [f"  for reference: {r.text} (published, {r.source})" for r in published_on(target.profile)]
    return [*lines, *(f"Not done: {line.what}: {line.why}" for line in skipped)]


@click.command()
@json_option
def doctor(as_json: bool) -> int:
    """Show versions, their known conflicts, and what can run on this machine; exit 1 if something is in conflict."""
    from dwindle.pipeline.doctor import examine

    found = examine()
    emit(found.to_json(), found.text(), as_json)
    return 1 if found.problems else 0
