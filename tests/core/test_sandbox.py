"""What unread code can do in the sandbox: compute. Everything else is tried here and must fail."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dwindle import sandbox
from dwindle.sandbox import SandboxUnavailable, run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits tried here are Linux's")


@pytest.fixture(params=["as this system permits", "without namespaces"])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways: with the namespaces, and where a system forbids them (Landlock and the filter alone)."""
    if request.param == "without namespaces":
        monkeypatch.setattr(sandbox, "_forbidden_namespaces", lambda: "namespaces (forbidden by a test)")
    lacking = [one for one in run_python("").missing if not one.startswith("namespaces")]
    if lacking:
        pytest.skip(f"this system gives no {'; '.join(lacking)}")
    return str(request.param)


@pytest.mark.usefixtures("limits")
def test_a_program_reads_its_input_and_says_its_output_and_code() -> None:
    result = run_python(
        "import sys; print(sys.stdin.read()[::-1]); print('no', file=sys.stderr); sys.exit(3)", stdin="üb"
    )
    assert (result.exit_code, result.stdout, result.stderr, result.timed_out) == (3, "bü\n", "no\n", False)


def test_it_says_what_the_system_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_forbidden_namespaces", lambda: "namespaces (forbidden by a test)")
    assert run_python("").missing == ("namespaces (forbidden by a test)",)


def test_an_infinite_loop_ends_with_the_time() -> None:
    begun = time.monotonic()
    result = run_python("print('on', flush=True)\nwhile True: pass", seconds=2)
    assert result.timed_out
    assert result.stdout == "on\n"
    assert time.monotonic() - begun < 20


def test_a_loop_that_closed_its_output_ends_with_the_time() -> None:
    assert run_python("import os; os.close(1); os.close(2)\nwhile True: pass", seconds=0.5).timed_out


@pytest.mark.parametrize("bomb", ["x = bytearray(1 << 34)", "x = []\nwhile True: x.append(bytearray(1 << 20))"])
def test_a_memory_bomb_meets_the_limit(bomb: str) -> None:
    result = run_python(bomb, memory_bytes=200 << 20)
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "MemoryError")


@pytest.mark.usefixtures("limits")
@pytest.mark.parametrize("attempt", [
    "import os\nwhile True: os.fork()",
    "import subprocess; subprocess.run(['true'])",
    "import socket; socket.socket()",
    "import socket; socket.create_connection(('127.0.0.1', 80))",
    "import os; os.kill(os.getppid(), 9)",
])  # fmt: skip
def test_no_processes_sockets_or_signals(attempt: str) -> None:
    result = run_python(attempt)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("PermissionError")


def test_threads_and_event_loops_work() -> None:
    code = "import threading, asyncio\nt = threading.Thread(target=print, args=('a',)); t.start(); t.join()\nasyncio.run(asyncio.sleep(0)); print('b')"
    assert run_python(code).stdout == "a\nb\n"


@pytest.mark.usefixtures("limits")
def test_nothing_is_written_outside(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    (tmp_path / "kept").write_text("old")
    for attempt in (f"open({str(tmp_path / 'new')!r}, 'w')", f"open({str(tmp_path / 'kept')!r}, 'w')",
                    f"import os; os.remove({str(tmp_path / 'kept')!r})", "open(__file__, 'a')"):  # fmt: skip
        result = run_python(attempt)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith(("PermissionError", "OSError: [Errno 30]"))
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "old"


@pytest.mark.usefixtures("limits")
def test_the_scratch_folder_can_be_written_and_is_removed() -> None:
    result = run_python("import os; open('a', 'w').write('x'); print(open('a').read(), os.getcwd())")
    read, place = result.stdout.split()
    assert read == "x"
    assert not Path(place).exists()
    assert not Path(place).parent.exists()


def test_a_file_and_all_files_have_a_size() -> None:
    assert "File too large" in run_python("open('a', 'wb').write(bytes(17 << 20))").stderr
    if not run_python("").missing:
        assert "No space left" in run_python("for i in range(5): open(str(i), 'wb').write(bytes(15 << 20))").stderr


def test_output_is_bounded() -> None:
    result = run_python("while True: print('x' * 1000)")
    assert result.truncated
    assert len(result.stdout) == 1 << 20


def test_closed_and_unread_input_does_no_harm() -> None:
    assert run_python("import sys; sys.stdin.close(); print(1)", stdin="x" * 1_000_000).stdout == "1\n"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "1")
    assert "A_SECRET" not in run_python("import os; print(dict(os.environ))").stdout


def test_a_signal_is_told_as_the_shell_does() -> None:
    assert run_python("import ctypes; ctypes.string_at(0)").exit_code == 128 + 11


def test_a_launcher_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_LAUNCHER", Path("/nowhere/launcher.py"))
    sandbox._forbidden_namespaces.cache_clear()
    with pytest.raises(SandboxUnavailable, match="could not be set up"):
        run_python("")
    sandbox._forbidden_namespaces.cache_clear()


def test_a_system_without_limits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_POSIX", False)
    with pytest.raises(SandboxUnavailable, match="Linux or macOS"):
        run_python("")
