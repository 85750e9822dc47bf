"""DPO's loss beside TRL's: the same pairs, the same two models, the loss and its gradient.

    python benchmarks/adapters_dpo.py --peer .venv-peers/bin/python

The policy is pycode-6m with noise on its weights, the reference pycode-6m itself; pairs are real preferences. Ours
holds no second model while it trains: the reference's log-probabilities are computed before.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from protocol import assets, model_folder

from dwindle import adapters
from dwindle.adapters.preference_loss import PreferenceLoss, reference_log_probs
from dwindle.adapters.task_tokens import preference_rows
from dwindle.bundle import ModelBundle

PEER = Path(__file__).resolve().parent / "peers" / "trl_dpo.py"
PAIRS, NOISE = 16, 0.01


def main() -> None:
    """Print both sides as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of the peers' environment.")
    parser.add_argument("--model", default="pycode-6m")
    options = parser.parse_args()
    reference = ModelBundle.load(model_folder(options.model))
    policy = replace(reference, model=copy.deepcopy(reference.model), storage_dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator)
    place = assets() / "data" / "preference" / "instruction-data-with-preference.json"
    task = adapters.TaskOptions("pairs", (str(place),), prompt="{instruction}\n{input}", chosen="chosen",
                                rejected="rejected", bad_records="drop", template="plain")  # fmt: skip
    pairs = adapters.tokenised(policy, adapters.read_task(task)).train[:PAIRS]
    rows = preference_rows(policy, pairs).ids
    for beta in (0.1, 0.5):
        policy.model.zero_grad()
        loss = PreferenceLoss(reference_log_probs(reference.model, rows, 8), beta).loss(policy.model, rows)[0]
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(policy.model.parameters(), float("inf")))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            policy.save(folder / "policy")
            given = [{"prompt_ids": p.prompt, "chosen_ids": p.answer, "rejected_ids": p.rejected} for p in pairs]
            (folder / "pairs.json").write_text(json.dumps(given))
            command = [options.peer, "-P", str(PEER), "--policy", str(folder / "policy"), "--reference",
                       str(model_folder(options.model)), "--pairs", str(folder / "pairs.json"), "--beta",
                       str(beta)]  # fmt: skip
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        peer = json.loads(done.stdout.strip().splitlines()[-1])
        ours = {"loss": float(loss.detach()), "gradient_norm": norm}
        print(json.dumps({"beta": beta, "pairs": len(pairs), "dwindle": ours, "trl": peer, "difference": {
            name: abs(value - peer[name]) for name, value in ours.items()}}))  # fmt: skip


if __name__ == "__main__":
    main()
