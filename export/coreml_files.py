"""What a Core ML package is on disk, and coremltools kept quiet while it reads or writes one."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import uuid
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dwindle.storage import write_text

__all__ = ["MANIFEST_FILE", "PACKAGE", "SPECIFICATION_FILE", "WEIGHTS_FILE", "fresh_names", "quiet_coremltools",
           "read_specification", "settle"]  # fmt: skip

PACKAGE = "model.mlpackage"
"""Name of the package inside an artifact folder."""
MANIFEST_FILE = "Manifest.json"
SPECIFICATION_FILE = "Data/com.apple.CoreML/model.mlmodel"
"""Where a package keeps its program and its description."""
WEIGHTS_FILE = "Data/com.apple.CoreML/weights/weight.bin"
"""Where it keeps its constants."""
_ITEMS = "itemInfoEntries"


def settle(package: Path) -> None:
    """Make the files a function of the model alone.

    coremltools draws the identifiers of the package's items by chance and leaves the order of a message's maps to the
    hash of the day, so that two exports of one model would differ. The manifest is written as Apple's library writes
    it, which rewrites it whenever it opens a package.
    """
    from coremltools.proto import Model_pb2

    specification = package / SPECIFICATION_FILE
    message = Model_pb2.Model.FromString(specification.read_bytes())
    specification.write_bytes(message.SerializeToString(deterministic=True))
    specification.chmod(0o644)
    manifest = json.loads((package / MANIFEST_FILE).read_text(encoding="utf-8"))
    fixed = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for name, item in manifest[_ITEMS].items()}
    manifest[_ITEMS] = {fixed[name]: item for name, item in manifest[_ITEMS].items()}
    manifest["rootModelIdentifier"] = fixed[manifest["rootModelIdentifier"]]
    write_text(package / MANIFEST_FILE, json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def read_specification(package: Path) -> Any:
    """Return the package's protobuf message. `coremltools.utils.load_spec` would write into the package."""
    from coremltools.proto import Model_pb2

    return Model_pb2.Model.FromString((package / SPECIFICATION_FILE).read_bytes())


@contextlib.contextmanager
def fresh_names() -> Iterator[None]:
    """Number coremltools' operations from 0: it counts on over all programs of a process."""
    from coremltools.converters.mil.mil import Builder

    counts, Builder.name_count = Builder.name_count, defaultdict(int)
    try:
        yield
    finally:
        Builder.name_count = counts


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[None]:
    """Keep coremltools' progress bars and version notices, and the tracer's warnings, off the screen; errors raise."""
    notices = logging.getLogger("coremltools")
    level = notices.level
    notices.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        notices.setLevel(level)
