"""What a Core ML package is on disk, and coremltools kept quiet while it reads or writes one."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import uuid
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dwindle.errors import MissingExtra, OutputError
from dwindle.storage import write_text

__all__ = ["MANIFEST_FILE", "PACKAGE", "SPECIFICATION_FILE", "WEIGHTS_FILE", "chunk_name", "fresh_names",
           "quiet_coremltools", "read_specification", "settle"]  # fmt: skip

PACKAGE = "model.mlpackage"
"""Name of the package inside an artifact folder, unless the model was cut."""
MANIFEST_FILE = "Manifest.json"
SPECIFICATION_FILE = "Data/com.apple.CoreML/model.mlmodel"
"""Where a package keeps its program and its description."""
WEIGHTS_FILE = "Data/com.apple.CoreML/weights/weight.bin"
"""Where it keeps its constants."""
_ITEMS = "itemInfoEntries"
_CONVERSION_DATE = "com.github.apple.coremltools.conversion_date"


def chunk_name(number: int, count: int) -> str:
    """Return the name of one of a cut model's packages; names sort in the order the packages are run.

    >>> chunk_name(2, 3)
    'model_02_of_03.mlpackage'
    """
    return f"model_{number:02}_of_{count:02}.mlpackage"


def settle(package: Path, features: Mapping[str, str], about: Mapping[str, Any]) -> None:
    """Write the package's metadata, and make its files a function of the model alone.

    `features` describes inputs and outputs by name, `about` holds the fields of the metadata. coremltools draws the
    identifiers of the package's items by chance, leaves the order of a message's maps to the hash of the day and writes
    the day down, so that two exports of one model would differ. The manifest is written as Apple's library writes it,
    which rewrites it whenever it opens a package.
    """
    message = read_specification(package)
    described = message.description
    for owner in (described, *described.functions):
        for feature in (*owner.input, *owner.output):
            feature.shortDescription = features.get(feature.name, "")
    for name, value in about.items():
        if isinstance(value, str):
            setattr(described.metadata, name, value)
        else:
            getattr(described.metadata, name).update(value)
    described.metadata.userDefined.pop(_CONVERSION_DATE, None)
    specification = package / SPECIFICATION_FILE
    specification.write_bytes(message.SerializeToString(deterministic=True))
    specification.chmod(0o644)
    manifest = json.loads((package / MANIFEST_FILE).read_text(encoding="utf-8"))
    fixed = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])) for name, item in manifest[_ITEMS].items()}
    manifest[_ITEMS] = {fixed[name]: item for name, item in manifest[_ITEMS].items()}
    manifest["rootModelIdentifier"] = fixed[manifest["rootModelIdentifier"]]
    write_text(package / MANIFEST_FILE, json.dumps(manifest, indent=4, sort_keys=True) + "\n")


def read_specification(package: Path) -> Any:
    """Return the package's protobuf message. `coremltools.utils.load_spec` would write into the package.

    Raises OutputError if it is no package or damaged, MissingExtra without coremltools.
    """
    try:
        with quiet_coremltools():
            import coremltools
    except ImportError as error:
        raise MissingExtra("Reading a Core ML package", "coreml") from error
    if not (package / MANIFEST_FILE).is_file():
        raise OutputError(f"{package} is no Core ML package. Give one that a coreml export wrote.")
    try:
        return coremltools.proto.Model_pb2.Model.FromString((package / SPECIFICATION_FILE).read_bytes())
    except Exception as error:  # whatever a damaged file makes protobuf stumble over
        raise OutputError(f"{package} cannot be read ({type(error).__name__}: {error}). It is damaged or no "
                          "mlprogram; export it again.") from error  # fmt: skip


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
