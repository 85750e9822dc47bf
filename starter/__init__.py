"""The embedded teacher and its story world: `dwindle demo` works with no download.

`story(seed)` tells a story and keeps its facts, `tasks(story)` asks about them, `corpus(seed, documents)` writes
training text, `check(task, text)` marks an answer, and `TEACHER` is the folder of a small model trained on all that.
Importing this package loads no torch.
"""

from __future__ import annotations

from pathlib import Path

from dwindle.starter.story_world import SPLITS, Story, story
from dwindle.starter.tasks import KINDS, Task, check, corpus, tasks

TEACHER = Path(__file__).resolve().parent / "teacher"

__all__ = ["KINDS", "SPLITS", "TEACHER", "Story", "Task", "check", "corpus", "story", "tasks"]
