"""Write a Llama of 1.1 billion random weights: 22 layers, width 2048, FFN 5632, vocabulary 32000, fp16, in shards.

Its weights are drawn tensor by tensor, so making it takes little memory; its tokenizer is a folder's own.

    python benchmarks/random_llama.py OUTPUT --tokenizer FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig

from dwindle.anatomy import anatomy_of
from dwindle.bundle import ModelBundle
from dwindle.lineage import Lineage
from dwindle.model_source import skeleton_of
from dwindle.shard_writer import ShardWriter
from dwindle.storage import atomic_folder
from dwindle.tokenizer_files import load_tokenizer

SHARD_BYTES = 500_000_000
SPREAD = 0.02


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="A checkpoint folder with a small tokenizer.")
    parser.add_argument("--layers", type=int, default=22)
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=options.layers,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    skeleton = skeleton_of(config)
    anatomy = anatomy_of(config)
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=False, vocab=anatomy.vocab)
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    with atomic_folder(options.output) as partial:
        with ShardWriter(partial, len(shapes), SHARD_BYTES) as writer:
            for name, shape in shapes.items():
                one = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * SPREAD
                writer.add(name, one.half())
        lineage = Lineage.origin("random-llama", {})
        bundle = ModelBundle(skeleton, tokenizer, anatomy, lineage, torch.float16)
        bundle.write_description(partial)


if __name__ == "__main__":
    main()
