"""The model card."""

from __future__ import annotations

import argparse
import sysconfig

from tools.train_demo.corpus import HELD_OUT_MODULUS
from tools.train_demo.network import ModelConfig
from tools.train_demo.training import TOKENS_PER_STEP

CARD = """# xLLM demo model

A very small language model ({parameters:.2f} million parameters) that lets xLLM run without a download. It
writes text that looks like Python and answers in ChatML. It is a demonstration and a test subject, not a
useful assistant: what it says is often wrong.

| | |
| --- | --- |
| architecture | Qwen3 (`Qwen3ForCausalLM`), tied embeddings, bfloat16 |
| layers, hidden size, feed-forward size | {num_hidden_layers}, {hidden_size}, {intermediate_size} |
| query heads, key/value heads, head size | {num_attention_heads}, {num_key_value_heads}, {head_dim} |
| vocabulary | {vocab_size} (byte-level BPE, no normalisation, three special tokens) |
| context | {max_position_embeddings} tokens |

## Training data

The Python {python} standard library, as every installation carries it: its sources (no tests, no character
tables), the topics of `help()`, and ChatML conversations made from its functions, classes and docstrings,
with a few hand-written greetings. One file in {modulus}, chosen by a hash of its path, is held out.
The model was trained on {tokens:.2f} million tokens of it, and on {closing:.2f} million of a last phase that
holds more greetings.

## Reproduce

    python -m tools.train_demo{arguments}

It needs `torch`, `tokenizers`, `safetensors` and `transformers`, and no network. It is seeded;
another version of Python or of these libraries gives a slightly different model.{time_note}

## Held-out bits per byte

The stored bfloat16 weights, on {files} held-out files ({bytes} bytes); lower is better. The model starts each
file without any context, as gzip does in the first of its rows.

| compressor | bits per byte |
| --- | --- |
| this model | {model:.3f} |
| gzip -9, each file separately | {gzip_separate:.3f} |
| gzip -9, all files concatenated | {gzip_together:.3f} |

## Samples

Greedy, at most 96 tokens.

{samples}
## Licence

Trained on the sources of the Python standard library, which are under the Python Software Foundation License
Version 2. Text that the model repeats from them remains under that licence.
"""

TIME_NOTE = """
The learning rate of the weights in this folder was lowered by the clock (`--minutes`), so a
repetition comes close to them but does not give the same bits."""


def render_card(config: ModelConfig, parameters: int, figures: dict[str, float], pairs: list[tuple[str, str]],
                seen: tuple[int, int], args: argparse.Namespace) -> str:
    """Fill in the model card; `seen` are the tokens of the main and of the last phase."""
    blocks = [f"Prompt `{prompt!r}`:\n\n~~~~\n{text.rstrip()}\n~~~~\n" for prompt, text in pairs]
    arguments = f" --tokens {seen[0]} --seed {args.seed}" + (" --float32" if args.float32 else "")
    by_time = seen[0] < int(args.tokens) // TOKENS_PER_STEP * TOKENS_PER_STEP
    return CARD.format(time_note=TIME_NOTE if by_time else "", parameters=parameters / 1e6,
                       modulus=HELD_OUT_MODULUS, tokens=seen[0] / 1e6, closing=seen[1] / 1e6,
                       python=sysconfig.get_python_version(), arguments=arguments, samples="\n".join(blocks),
                       **vars(config), **figures)
