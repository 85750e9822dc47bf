"""`make bench`: dwindle beside its peers.

Two kinds of cases. An alternated case is one job done by dwindle and by a peer, in turn, in fresh processes; it prints
the medians of wall seconds and peak resident memory, the quality both reached, and the ratio peer / dwindle of each
pair of runs. Absolute seconds mean little on a shared machine; the ratios of alternated runs are what to quote.
`quality` fills the table of `quality.py` (hours, the first time; it goes on where it stopped), `scale` measures memory
on a model of a billion weights (`scale.py`), `host` holds estimates of this machine to measurements
(`host_accuracy.py`), `onnx` decodes beside ONNX Runtime GenAI's own builder (`onnx_decode.py`),
`adapters` fills the tables of recovery and of tasks, measures the memory of training, and sets DPO beside TRL's
(`adapters_quality.py`, `adapters_memory.py`, `adapters_dpo.py`),
`adapters-runtime` measures what swapping and using an adapter costs in ONNX Runtime (`adapters_runtime.py`),
`gate` exports the real models to every format and executes them (`gate.py`), `prune` fills the pruning tables
(`prune_quality.py`; an hour or two, it goes on where it stopped), `distill-loss`, `distill-step` and `distill-quality`
measure a loss alone, a training step and the students of each loss (`distill_loss.py`, `distill_step.py`,
`distill_quality.py`), `report` opens the report of a 32-layer model in a browser (`report_page.py`),
`data` plants copies, evaluation n-grams and personal data, and times curation (`data_curation.py`), `data-pays` trains
students on raw, curated and written text, and on learned mixtures (`data_pays.py`, `data_mixture.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "build" / "bench"
PALETTIZE = {
    shape: ["--rows", shape.split("x")[0], "--columns", shape.split("x")[1], "--bits", "4"]
    for shape in ("2048x2048", "3072x8192")
}
ALTERNATED = {
    f"palettize-{shape}-4bit-16rows-{peer}": ("palettize.py", peer, arguments)
    for shape, arguments in PALETTIZE.items()
    for peer in ("coremltools", "coreai-opt")
}
"""Case -> (script, name of the peer's side, arguments); each script takes `--who` and prints one JSON line last."""
CASES = (*ALTERNATED, "quality", "scale", "onnx", "adapters", "adapters-runtime", "host", "gate", "report", "prune",
         "distill-loss", "distill-step", "distill-quality", "data", "data-pays")  # fmt: skip


def once(python: str, script: str, who: str, arguments: list[str]) -> dict[str, float]:
    """Run one side of a case in a fresh process; it prints one JSON line last."""
    command = [python, "-P", str(HERE / script), "--who", who, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def alternated(name: str, peers: str, runs: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """Run both sides of a case in turn, print their comparison, and return all single results."""
    script, who, arguments = ALTERNATED[name]
    pairs = [
        (once(sys.executable, script, "dwindle", arguments), once(peers, script, who, arguments)) for _ in range(runs)
    ]
    print(f"\n{name} ({runs} alternated runs)")
    for key in pairs[0][0]:
        ours, peer = (statistics.median(side[key] for side in sides) for sides in zip(*pairs, strict=True))
        ratios = sorted(p[key] / o[key] for o, p in pairs if o[key])
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}" if ratios else "-"
        print(f"  {key:24} dwindle {ours:<12.6g} {who} {peer:<12.6g} {who}/dwindle {spread}")
    return pairs


def quality(peers: list[str], results: Path) -> None:
    """Do what is missing of the quality table and print it."""
    results.parent.mkdir(parents=True, exist_ok=True)
    given = [argument for python in peers for argument in ("--peers", python)]
    subprocess.run([sys.executable, str(HERE / "quality.py"), "--results", str(results), *given], check=True)


def scale() -> None:
    """Quantize half a billion and a billion weights."""
    for layers in ("11", "22"):
        subprocess.run([sys.executable, str(HERE / "scale.py"), "--layers", layers], check=True)


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", action="append", help="Python of a peers' environment; once for each, in order.")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--case", action="append", choices=CASES, help="Only this case; repeat for more.")
    parser.add_argument("--json", type=Path, help="Also write all single results of alternated cases here.")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.json", help="Records of the quality table.")
    options = parser.parse_args()
    peers = options.peers or [sys.executable]
    everything = {}
    for name in options.case or CASES:
        if name == "quality":
            quality(peers, options.results)
        elif name == "scale":
            scale()
        elif name == "onnx":
            subprocess.run([sys.executable, str(HERE / "onnx_decode.py")], check=True)
        elif name == "adapters":
            results = ["--results", str(RESULTS / "adapters.json")]
            subprocess.run([sys.executable, str(HERE / "adapters_quality.py"), *results], check=True)
            subprocess.run([sys.executable, str(HERE / "adapters_memory.py")], check=True)
            subprocess.run([sys.executable, str(HERE / "adapters_dpo.py"), "--peer", peers[0]], check=True)
        elif name == "adapters-runtime":
            subprocess.run([sys.executable, str(HERE / "adapters_runtime.py")], check=True)
        elif name == "host":
            subprocess.run([sys.executable, str(HERE / "host_accuracy.py")], check=True)
        elif name == "prune":
            results = ["--results", str(RESULTS / "prune_quality.json")]
            subprocess.run([sys.executable, str(HERE / "prune_quality.py"), *results, "--peer", peers[0]], check=True)
        elif name == "distill-loss":
            command = [sys.executable, "-P", str(HERE / "distill_loss.py"), "--peers", peers[0]]
            subprocess.run([*command, "--runs", str(options.runs), "--check"], check=True)
        elif name == "distill-step":
            command = [sys.executable, "-P", str(HERE / "distill_step.py"), "--peers", peers[0]]
            subprocess.run([*command, "--runs", str(options.runs)], check=True)
        elif name == "distill-quality":
            results = ["--results", str(RESULTS / "distill_quality.json")]
            subprocess.run([sys.executable, str(HERE / "distill_quality.py"), *results, "--peer", peers[0]], check=True)
        elif name == "report":
            subprocess.run([sys.executable, "-P", str(HERE / "report_page.py")], check=True)
        elif name == "data-pays":
            results = ["--results", str(RESULTS / "data_pays.json")]
            subprocess.run([sys.executable, str(HERE / "data_pays.py"), *results], check=True)
            subprocess.run([sys.executable, str(HERE / "data_mixture.py")], check=True)
        elif name == "data":
            given = ["--peer", peers[2]] if len(peers) > 2 else []
            subprocess.run([sys.executable, str(HERE / "data_curation.py"), *given], check=True)
        elif name == "gate":
            subprocess.run([sys.executable, str(HERE / "gate.py"), "--results", str(RESULTS / "gate.json")], check=True)
        else:
            everything[name] = alternated(name, peers[0], options.runs)
    if options.json:
        options.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
