"""Raw text as it is found: real documents with near-duplicates, boilerplate and noise planted among them.

| what is planted | how much, of the bytes of the real text |
|---|---|
| near-duplicates | 60 %: copies of one document in twenty, every copy with 3 % of its words replaced |
| boilerplate | 30 %: a dozen or two lines out of one list of notices, menus and licence headers |
| noise | 60 %: random characters, encoded data, documents with their letters shuffled, a third each |
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Sequence

from dwindle.data.document import Document

__all__ = ["planted"]

_NOTICES = [
    "We use cookies to improve your experience. By continuing you accept our cookie policy.", "Home | About | Contact",
    "Subscribe to our newsletter for weekly updates.", "All rights reserved. No part may be reproduced.",
    "Click here to read more.", "Share this page with your friends.", "Page not found. Return to the home page.",
    "Please log in to leave a comment.", "Advertisement", "Terms of service | Privacy policy | Imprint",
    "Sign up today and save 20 % on your first order.", "Related articles you may like", "Back to top",
    "Loading, please wait ...", "Your session has expired. Sign in again.", "Add to cart", "Follow us on social media",
    "This website requires a modern browser.", "Previous | Next", "Last updated: see the archive for older versions.",
]  # fmt: skip
_HEADERS = [
    "# Licensed under the Apache License, Version 2.0 (the License);", "# you may use this file in compliance with it.",
    "# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.", "# Copyright (c) The Authors.",
    "# This file was generated automatically. Do not edit.", "__all__ = []", "pass", "# -*- coding: utf-8 -*-",
    "# All rights reserved.", "# See the LICENSE file in the project root for details.", "import os", "import sys",
    "class Empty(object):", "    pass", "def main():", "    raise NotImplementedError", "if __name__ == '__main__':",
    "    main()", "# Permission is hereby granted, free of charge, to any person obtaining a copy", "# THE SOFTWARE.",
]  # fmt: skip


def planted(real: Sequence[Document], *, code: bool, seed: int = 0) -> list[Document]:
    """Return the real documents and what is planted, shuffled. `source` says which is which; no filter reads it."""
    draw = random.Random(seed)  # noqa: S311  (no secret)
    size = sum(document.bytes for document in real)
    copied = draw.sample(list(real), max(1, len(real) // 20))
    words = [word for document in real[:50] for word in document.text.split()]
    makers: list[tuple[str, float, Callable[[], str]]] = [
        ("near-duplicate", 0.6, lambda: _edited(draw.choice(copied).text, words, draw)),
        ("boilerplate", 0.3, lambda: _boilerplate(draw, code)),
        ("noise", 0.6, lambda: _noise(draw, real)),
    ]
    made = list(real)
    kind = {"kind": "code"} if code else {}
    for source, share, make in makers:
        left = share * size
        while left > 0:
            text = make()
            left -= len(text.encode())
            made.append(Document(text, source, how=kind))
    draw.shuffle(made)
    return [Document(d.text, d.source, id=f"{i:06}", how=d.how) for i, d in enumerate(made)]


def _edited(text: str, words: Sequence[str], draw: random.Random) -> str:
    parts = text.split(" ")
    for place in draw.sample(range(len(parts)), max(1, len(parts) * 3 // 100)):
        parts[place] = draw.choice(words)
    return " ".join(parts)


def _boilerplate(draw: random.Random, code: bool) -> str:
    lines = _HEADERS if code else _NOTICES
    return "\n".join(draw.choice(lines) for _ in range(draw.randint(12, 24))) + "\n"


def _noise(draw: random.Random, real: Sequence[Document]) -> str:
    kind = draw.randrange(3)
    if kind == 0:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz      0123456789.,;:()") for _ in range(1200))
    if kind == 1:
        return base64.encodebytes(draw.randbytes(900)).decode()
    words = draw.choice(list(real)).text[:1500].split(" ")
    return " ".join("".join(draw.sample(word, len(word))) for word in words)
