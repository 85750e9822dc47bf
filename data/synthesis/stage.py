"""Synthesis as a stage of a corpus: the documents go on as they are, and what a model made of them comes behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dwindle.data.curation.spool import Spool
from dwindle.data.curation.stage import StageRun
from dwindle.data.curation.stage_count import StageCount
from dwindle.data.document import Document
from dwindle.data.synthesis.options import SynthesisOptions
from dwindle.errors import RecipeError

__all__ = ["Synthesize"]


@dataclass(frozen=True)
class Synthesize(SynthesisOptions):
    """Adds what a model writes from the corpus so far."""

    teacher: str = ""
    """Folder or Hugging Face id of the model that writes."""
    torch_device: str = "cpu"
    """Where it runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher:
            raise RecipeError("synthesize: teacher is missing (needed: the model that writes).")

    @property
    def name(self) -> str:
        """Return what the card calls the stage."""
        return "synthesize"

    def run(self, documents: Iterator[Document], run: StageRun) -> Iterator[Document]:
        """Yield all documents, then the pieces that pass. What was dropped of them stands in the details."""
        from dwindle.bundle import ModelBundle
        from dwindle.data.synthesis.step import empty_error, synthesized

        spool = Spool(run.folder / "documents.jsonl")
        try:
            for document in documents:
                spool.add(document)
                yield document
            writer = ModelBundle.load(self.teacher, torch_device=self.torch_device)
            verifier = None
            if self.verifier is not None:
                verifier = ModelBundle.load(self.verifier.model, torch_device=self.torch_device)
            count = StageCount(self.name, self.seed)
            for piece in synthesized(writer, self, spool, folder=run.folder / "pieces", count=count, verifier=verifier):
                run.count.changes["pieces added"] += 1
                yield piece
            run.count.details["pieces"] = count.to_json()
            if not count.documents_out:
                raise empty_error(count)
        finally:
            spool.close()
