"""Kill a whole pipeline again and again, at random file operations and random times: `crash.py --kills 200`.

One undisturbed run of a micro recipe (every step that a recipe can have) is the reference. Then runs are started,
ended in the middle, started again, until they finish; each start is a forked process of this one, so that no time goes
into imports. How a start ends is drawn by chance:

    kill        SIGKILL at a random file operation of Python (open for writing, fsync, rename, remove, mkdir)
    late kill   SIGKILL after a random time, which also hits C++ and Rust code
    term, int   SIGTERM, SIGINT at a random file operation: exit code 130 is needed
    full disk   ENOSPC at a random operation and all after it: exit code 2 and no traceback are needed
    exception   an error nobody foresaw at a random operation

After each end: finished steps stay finished (their records are not touched by the next start), the next start is not
blocked. When a run finishes: the same bytes in every step's model and artifact, the same report but for times, no
left-over file, as in the undisturbed run. Prints the counts; exit code 1 and what differed if anything did.
"""

from __future__ import annotations

import argparse
import copy
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import valid_files

__all__ = ["Ending", "compared", "crash", "micro_steps", "start"]

ENDINGS = ("kill", "kill", "kill", "kill", "late kill", "late kill", "term", "int", "full disk", "exception")
MICRO: dict[str, Any] = {
    "correct_teacher": {"tokens": 512, "batch_size": 4},
    "prune": {"ffn_keep": 0.5},
    "distill": {"losses": [{"name": "forward_kl"}], "tokens": 4096, "batch_size": 4, "checkpoint_every": 4},
    "quantize": {"scheme": "integer"},
    "recover": {"rank": 2, "steps": 3, "batch_size": 2, "checkpoint_every": 2},
    "adapt": {
        "tasks": [{"name": "animals", "data": ["animals.jsonl"], "label": "sound"}],
        "epochs": 1,
        "batch_size": 8,
    },
    "export": {"formats": ["onnx"], "prompts": 1},
    "validate": {"targets": ["iphone-15-pro"], "repeats": 1},
}
"""The smallest options of every step a recipe can have. A new step needs a line here: `micro_steps` says so."""
VOLATILE = ("seconds", "peak_rss_bytes", "export_seconds", "parity_seconds", "tokens_per_second", "environment", "time")


SOUNDS = {"cat": "meow", "dog": "woof"}
SLOW_FORMATS = ["coreml"]
VARIANTS = {"apple": {"scheme": "palettize"}, "onnx": {"scheme": "integer"}}
"""Formats and variants that take most of a run's time: only every fifth run has them."""


def micro_steps(folder: Path, *formats: str) -> list[dict[str, Any]]:
    """Return one of each step in the order that a recipe wants."""
    from dwindle.pipeline.recipe import ORDER

    missing = [name for name in ORDER if name not in MICRO]
    if missing:
        raise SystemExit(f"no micro options for the steps {', '.join(missing)}: add them to MICRO in {__file__}")
    steps = [{name: copy.deepcopy(MICRO[name])} for name in sorted(ORDER, key=lambda name: ORDER[name])]
    for step in steps:
        for task in step.get("adapt", {}).get("tasks", ()):
            task["data"] = [str(folder / "animals.jsonl")]
        if formats and "quantize" in step:
            step["quantize"] = copy.deepcopy(VARIANTS)
        if "export" in step:
            step["export"]["formats"] = [*step["export"]["formats"], *formats]
    return steps


class Ending:
    """How one start is ended: `kind`, and at which file operation (None: never)."""

    def __init__(self, kind: str, at: int | None, folder: Path) -> None:
        self.kind, self.at, self.folder = kind, at, str(folder)
        self.seen = 0

    def install(self) -> None:
        """Watch this process's file operations from now on."""
        sys.addaudithook(self._hook)
        sync = os.fsync

        def fsync(handle: Any) -> None:
            self._operation()
            sync(handle)

        os.fsync = fsync

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            flags = arguments[2]
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
        if writes and str(arguments[0]).startswith(self.folder):
            self._operation()

    def _operation(self) -> None:
        self.seen += 1
        if self.at is None or self.seen < self.at:
            return
        if self.kind == "full disk":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.seen > self.at:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.kind == "int":
            os.kill(os.getpid(), signal.SIGINT)
        elif self.kind == "exception":
            raise ArithmeticError("an error nobody foresaw")


def start(words: list[str], ending: Ending, told: Path, after_seconds: float | None = None) -> tuple[int, int]:
    """Run `dwindle WORDS` in a forked child; return (exit code or -signal, file operations seen)."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        code = 70
        try:
            out = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
            sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from dwindle.pipeline.cli import main

            ending.install()
            main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:  # noqa: BLE001  (whatever ends the child is its result)
            traceback.print_exc()
            code = 1
        finally:
            os.write(writer, str(ending.seen).encode())
            os._exit(code)
    os.close(writer)
    deadline = None if after_seconds is None else time.monotonic() + after_seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.005)
    seen = os.read(reader, 32)
    os.close(reader)
    code = os.waitstatus_to_exitcode(status)
    return code, int(seen or 0)


def _plain(value: Any) -> Any:
    """Return a report without what may differ between two runs: times and the memory of the process."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in VOLATILE}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value


def _hashes(folder: Path) -> dict[str, str]:
    from dwindle.storage import hash_folder

    places = [
        *(p for p in folder.glob("steps/*/*") if p.is_dir()),
        *(p.parent for p in folder.glob("export/**/manifest.json")),
    ]
    return {p.relative_to(folder).as_posix(): hash_folder(p) for p in sorted(places)}


def compared(found: Path, reference: Path) -> list[str]:
    """Return a line for everything in which a finished run differs from the undisturbed one."""
    ours, theirs = _hashes(found), _hashes(reference)
    wrong = [
        f"{name}: other bytes" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)
    ]
    reports = [_plain(json.loads((one / "report.json").read_text())) for one in (found, reference)]
    wrong += [f"report.json: {key} differs" for key in reports[1] if reports[0].get(key) != reports[1][key]]
    names = [sorted(p.relative_to(one).as_posix() for p in one.rglob("*") if p.is_file()) for one in (found, reference)]
    wrong += [f"left over: {name}" for name in names[0] if name not in names[1]]
    wrong += [f"missing: {name}" for name in names[1] if name not in names[0]]
    for line in (found / "run.jsonl").read_text().splitlines()[-1:]:
        json.loads(line)
    return wrong


def _records(folder: Path) -> dict[str, int]:
    """Return the finished steps and when each was written."""
    return {p.parent.name: p.stat().st_mtime_ns for p in folder.glob("steps/[!.]*/record.json")}


class _Story:
    """Counts and faults of all runs so far."""

    def __init__(self) -> None:
        self.ends: Counter[str] = Counter()
        self.faults: list[str] = []
        self.runs = 0


def _judge(kind: str, code: int, text: str) -> str | None:
    """Return what is wrong about how a start ended, or None."""
    if kind in ("term", "int") and code != 130:
        return f"{kind}: exit code {code}, needed 130"
    if kind == "full disk" and (code != 2 or "Traceback" in text or "no space left" not in text):
        return f"full disk: exit code {code}, needed 2 and the remedy"
    if kind == "exception" and code not in (1, 2):
        return f"exception: exit code {code}"
    return None


def crash(kills: int, seed: int, folder: Path, say: Any = print, *, twice: bool = True, slow: bool = True) -> _Story:
    """Disturb runs until `kills` of them were ended; return the story. `folder` holds the files of `valid_files`."""
    rng, story = random.Random(seed), _Story()
    plain, whole = _Reference(folder, "plain"), None
    say(f"undisturbed: {plain.operations} file operations, {plain.seconds:.1f} s", flush=True)
    if twice:
        story.faults += plain.second_time()
    while sum(story.ends.values()) < kills:
        story.runs += 1
        if slow and story.runs % 5 == 4:
            whole = whole or _Reference(folder, "slow", *SLOW_FORMATS)
        reference = whole if whole is not None and story.runs % 5 == 4 else plain
        _one_run(folder / f"run{story.runs}", reference, rng, story)
        say(f"{sum(story.ends.values())} ends, {story.runs} finished runs, {len(story.faults)} faults", flush=True)
    return story


class _Reference:
    """A recipe, and what it gives undisturbed."""

    def __init__(self, folder: Path, name: str, *formats: str) -> None:
        import yaml

        self.recipe, self.place, self.told = (
            folder / f"{name}.yaml",
            folder / f"{name}-undisturbed",
            folder / "told.txt",
        )
        rows = [{"prompt": f"{n} {what}", "sound": sound} for n in range(16) for what, sound in SOUNDS.items()]
        (folder / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = micro_steps(folder, *formats)
        self.recipe.write_text(yaml.safe_dump(valid_files.micro_recipe(folder, steps=steps), sort_keys=False))
        self.seconds, self.operations = self._whole(self.place)

    def _whole(self, place: Path) -> tuple[float, int]:
        began = time.monotonic()
        code, operations = start(self.words(place), Ending("none", None, place), self.told)
        if code != 0:
            raise SystemExit(f"the undisturbed run ended with {code}:\n{self.told.read_text()}")
        return time.monotonic() - began, operations

    def words(self, place: Path) -> list[str]:
        """Return the command line of a run into `place`."""
        return ["run", str(self.recipe), "-o", str(place)]

    def second_time(self) -> list[str]:
        """Return what differs when the run is made a second time elsewhere, undisturbed again."""
        again = self.place.with_name("again")
        self._whole(again)
        wrong = [f"undisturbed, a second time: {line}" for line in compared(again, self.place)]
        shutil.rmtree(again)
        return wrong


def _one_run(place: Path, reference: _Reference, rng: random.Random, story: _Story) -> None:
    """Start, end and start again until the run finishes."""
    operations, told = reference.operations, reference.told
    step = first = max(2, operations // rng.choice((3, 6, 12, 25)))
    for _ in range(200):
        kind = rng.choice(ENDINGS)
        late = kind == "late kill"
        at = None if late else rng.randint(1, step)
        before = _records(place)
        code, _ = start(reference.words(place), Ending(kind, at, place), told,
                        rng.uniform(0, reference.seconds * step / operations) if late else None)  # fmt: skip
        text = told.read_text(errors="replace")
        redone = [name for name, when in before.items() if _records(place).get(name) != when]
        if redone:
            story.faults.append(f"{place.name}: finished steps were done again after {kind}: {', '.join(redone)}")
        if code == 0:
            break
        if code not in (-9, 130) and kind in ("kill", "late kill"):
            story.faults.append(f"{place.name}: ended with {code} by itself:\n{text[-2000:]}")
            break
        if (fault := _judge(kind, code, text)) is not None:
            story.faults.append(f"{place.name}: {fault}:\n{text[-1500:]}")
        story.ends[kind] += 1
        step = first if _records(place).keys() > before.keys() else round(1.2 * step) + 1  # else a long step never ends
        print(f"  {place.name}: {kind} at {at or 'a random time'}, exit code {code}", flush=True)
    else:
        story.faults.append(f"{place.name}: did not finish in 200 starts")
    if (place / "report.json").exists():
        story.faults += [f"{place.name}: {line}" for line in compared(place, reference.place)]
    shutil.rmtree(place, ignore_errors=True)


def preload() -> None:
    """Import what a run needs, so that forked children need not."""
    import torch

    torch.set_num_threads(1)
    from dwindle import adapters, devices, distill, export, prune, quantize  # noqa: F401
    from dwindle.export import coreml_package, onnx_graph  # noqa: F401
    from dwindle.pipeline import cli, runner  # noqa: F401


def main() -> int:
    """Crash runs as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="without the second undisturbed run and Core ML")
    parser.add_argument("--files", type=Path, help="folder of the valid files (kept for the next time)")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="dwindle-crash-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    try:
        shutil.copytree(valid_files.make(given.files or scratch / "made"), scratch / "files")
        preload()
        story = crash(given.kills, given.seed, scratch / "files", twice=not given.quick, slow=not given.quick)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"{sum(story.ends.values())} ends ({dict(story.ends)}) over {story.runs} runs, {len(story.faults)} faults")
    for fault in story.faults:
        print(f"FAULT {fault}")
    return 1 if story.faults else 0


if __name__ == "__main__":
    sys.exit(main())
