"""The rows of the quality table: which methods of dwindle and of the peers, at which bits.

A peer's row names a script of `peers/`, one of its methods, and the number of the environment that it runs in (1 is
`requirements/peers.txt`, 2 is `requirements/peers-2.txt`). A row of dwindle's is one set of `QuantizeOptions`;
`uses_text=False` withholds the calibration text. Add rows at will: what the results file has is not done again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["DWINDLE", "PEERS", "DwindleRow", "PeerRow"]

Kind = Literal["palettes", "integers"]
MIXED = 3.5
"""Bits per weight of mixed precision, scales and palettes included."""


@dataclass(frozen=True)
class PeerRow:
    """One method of a peer."""

    peer: str
    script: str
    method: str
    kind: Kind
    group: int
    bits: tuple[float, ...]
    environment: int = 1
    uses_text: bool = True


@dataclass(frozen=True)
class DwindleRow:
    """One method of dwindle's."""

    method: str
    """Label in the table."""
    kind: Kind
    group: int
    bits: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    """What `QuantizeOptions` gets beside bits (or the target) and `keep_float`."""
    uses_text: bool = True

    def options_for(self, bits: float, model: str) -> dict[str, Any]:
        """Return the options at a bit width: 4, 3, 2 ask for `bits`, a fraction for that target."""
        wanted = {"bits": int(bits)} if float(bits).is_integer() else {"target_bits_per_weight": bits}
        if self.options["method"] == "learned":
            wanted["iterations"] = ITERATIONS[bits] // (2 if model == "pycode-6m" else 1)
        return wanted | self.options | {"calibrated": self.uses_text}


ITERATIONS = {4.0: 100, 3.5: 150, 3.0: 200, 2.0: 400}
"""Steps of learned rounding; half as many for pycode-6m, whose steps cost twenty times those of the others."""
WIDTHS = (4.0, 3.0, 2.0)
PEERS: tuple[PeerRow, ...] = (
    PeerRow("coremltools", "coremltools_palettes.py", "ptp", "palettes", 16, WIDTHS, uses_text=False),
    PeerRow("coremltools", "coremltools_palettes.py", "skm", "palettes", 16, WIDTHS),
    PeerRow("coreai-opt", "coreai_palettes.py", "kmeans", "palettes", 16, WIDTHS, uses_text=False),
    PeerRow("coreai-opt", "coreai_palettes.py", "kmeans-sensitive", "palettes", 16, WIDTHS),
    PeerRow("onnxruntime", "onnxruntime_integers.py", "rtn", "integers", 32, (4.0, 2.0), uses_text=False),
    PeerRow("onnxruntime", "onnxruntime_integers.py", "k-quant", "integers", 32, (4.0,), uses_text=False),
    PeerRow("onnxruntime", "onnxruntime_integers.py", "hqq", "integers", 32, (4.0, 2.0), uses_text=False),
    PeerRow("torchao", "torchao_integers.py", "rtn", "integers", 32, WIDTHS, uses_text=False),
    PeerRow("torchao", "torchao_integers.py", "hqq", "integers", 32, WIDTHS, uses_text=False),
    PeerRow("hqq", "hqq_integers.py", "hqq", "integers", 64, WIDTHS, uses_text=False),
    PeerRow("coremltools", "coremltools_gptq.py", "gptq-asym", "integers", 32, WIDTHS),
    PeerRow("llm-compressor", "llm_compressor_integers.py", "gptq-sym", "integers", 32, WIDTHS, environment=2),
    PeerRow("llm-compressor", "llm_compressor_integers.py", "gptq-asym", "integers", 32, WIDTHS, environment=2),
    PeerRow("auto-round", "auto_round_integers.py", "sym", "integers", 32, WIDTHS),
    PeerRow("auto-round", "auto_round_integers.py", "asym", "integers", 32, WIDTHS),
    PeerRow("auto-round", "auto_round_integers.py", "sym-best", "integers", 32, (2.0,)),
    PeerRow("auto-round", "auto_round_integers.py", "sym-mixed", "integers", 32, (MIXED,)),
)

PALETTES = {"scheme": "palettize"}
INTEGERS = {"scheme": "integer"}
ASYMMETRIC = INTEGERS | {"symmetric": False}
DWINDLE: tuple[DwindleRow, ...] = (
    DwindleRow("kmeans", "palettes", 16, WIDTHS, PALETTES | {"method": "kmeans"}, uses_text=False),
    DwindleRow("kmeans fisher", "palettes", 16, WIDTHS, PALETTES | {"method": "kmeans", "importance": "fisher"}),
    DwindleRow("lnq", "palettes", 16, (*WIDTHS, MIXED), PALETTES | {"method": "lnq"}),
    DwindleRow("rtn", "integers", 32, WIDTHS, INTEGERS | {"method": "rtn"}, uses_text=False),
    DwindleRow("hqq", "integers", 32, WIDTHS, INTEGERS | {"method": "hqq"}, uses_text=False),
    DwindleRow("gptq", "integers", 32, (*WIDTHS, MIXED), INTEGERS | {"method": "gptq"}),
    DwindleRow("gptq asym", "integers", 32, WIDTHS, ASYMMETRIC | {"method": "gptq"}),
    DwindleRow("learned", "palettes", 16, WIDTHS, PALETTES | {"method": "learned"}),
    DwindleRow("learned", "integers", 32, (*WIDTHS, MIXED), INTEGERS | {"method": "learned"}),
    DwindleRow("qat, tuned", "palettes", 16, (2.0,), PALETTES | {"method": "qat", "tune_steps": 60}),
    DwindleRow("learned", "palettes", 16, (MIXED,), PALETTES | {"method": "learned"}),
)
