"""How an artifact is measured: one protocol for every target. Torch-free.

A prompt of 512 tokens and 128 generated ones unless told otherwise (the lengths that published tables use: llama.cpp's
pp512 / tg128), one turn to warm up that does not count, then the repeats; the median counts, the extremes are told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from dwindle.devices.cost_model import DEFAULT_PROMPT_TOKENS
from dwindle.errors import RecipeError, did_you_mean

__all__ = ["BenchOptions", "Protocol", "RuntimeName"]

RuntimeName = Literal["onnxruntime", "genai", "coreai", "coreml"]
"""What can run an artifact."""


@dataclass(frozen=True)
class Protocol:
    """The lengths one measurement was made with, after the artifact's context had its say."""

    prompt_tokens: int
    decode_tokens: int
    warm_up: int
    repeats: int
    context: int
    threads: int | None = None


@dataclass(frozen=True)
class BenchOptions:
    """How an artifact is measured."""

    prompt_tokens: int = DEFAULT_PROMPT_TOKENS
    """Tokens before the first generated one; cut to half of the context."""
    decode_tokens: int = 128
    """Tokens generated per repeat; cut to what the context leaves."""
    warm_up: int = 1
    """Turns before the first repeat that counts."""
    repeats: int = 5
    """Runs of prompt and decoding; the median counts."""
    threads: int | None = None
    """Threads of the runtime; None leaves it to the runtime (one per core)."""
    context: int | None = None
    """Tokens the KV cache is made for; the artifact's whole context unless given."""
    runtime: RuntimeName | None = None
    """What runs the artifact; None: the runtime of its format (onnxruntime, coreai, coreml)."""
    timeout_seconds: float = 1800.0
    """When to give up on a target that says nothing."""
    identity: Path | None = None
    """ssh: private key to log in with; the user's own configuration unless given."""
    known_hosts: Path | None = None
    """ssh: file of known host keys; the user's own unless given."""
    python: str = "python3"
    """ssh and adb: Python on the target that has the runtime, as a name or a path there (`~/venv/bin/python`)."""
    runner: Path | None = None
    """adb: a program for the phone that speaks the runner's protocol, pushed and run in place of Python."""
    development_team: str = ""
    """apple: the team that signs Apple's model runner for a device; Xcode's own choice unless given."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={getattr(self, name)}: must be at least 1"
            for name in ("prompt_tokens", "decode_tokens", "repeats")
            if getattr(self, name) < 1
        ]
        problems += [
            f"{name}={getattr(self, name)}: must be at least 1, or left out"
            for name in ("threads", "context")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if self.warm_up < 0:
            problems.append(f"warm_up={self.warm_up}: must be at least 0")
        if self.timeout_seconds <= 0:
            problems.append(f"timeout_seconds={self.timeout_seconds}: must be more than 0")
        known = get_args(RuntimeName)
        if self.runtime is not None and self.runtime not in known:
            problems.append(f"runtime={self.runtime!r}: no runtime{did_you_mean(str(self.runtime), known)}")
        for name in ("identity", "known_hosts", "runner"):
            given = getattr(self, name)
            if given is not None and not Path(given).is_file():
                problems.append(f"{name}={str(given)!r}: no such file")
        if not self.python or self.python.startswith("-") or "\n" in self.python or "\0" in self.python:
            problems.append(f"python={self.python!r}: needed the name or path of a program")
        if problems:
            raise RecipeError("; ".join(problems) + ".")

    def protocol(self, context_length: int) -> Protocol:
        """Return the lengths for an artifact of this context: a prompt of at most half, decoding in what is left.

        >>> BenchOptions().protocol(2048)
        Protocol(prompt_tokens=512, decode_tokens=128, warm_up=1, repeats=5, context=2048, threads=None)
        >>> BenchOptions().protocol(100).prompt_tokens, BenchOptions().protocol(100).decode_tokens
        (50, 50)
        """
        context = min(self.context or context_length, context_length)
        prompt = min(self.prompt_tokens, max(1, context // 2))
        decode = min(self.decode_tokens, context - prompt)
        return Protocol(prompt, decode, self.warm_up, self.repeats, context, self.threads)
