"""From raw text to a corpus: stages that drop and change documents, with counts and examples of what they did."""

from __future__ import annotations
