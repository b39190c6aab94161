"""Command line: every step, from the corpus to the model card."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from tools.train_demo.card import render_card
from tools.train_demo.corpus import SourceFile, split_files, stdlib_files
from tools.train_demo.documents import closing_documents, training_documents
from tools.train_demo.evaluation import compare_with_gzip, samples
from tools.train_demo.export import export
from tools.train_demo.network import DemoModel, ModelConfig
from tools.train_demo.tokenizer import encode_stream, train_tokenizer
from tools.train_demo.training import Phase, train

CLOSING_TOKENS = 400_000  # of the last phase, see closing_documents


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_demo",
                                     description="Train the bundled demo model from the Python standard library.")
    parser.add_argument("--out", type=Path, default=Path("xllm/bundled"), help="folder of the checkpoint")
    parser.add_argument("--tokens", type=float, default=6e6, help="how many tokens to train on")
    parser.add_argument("--minutes", type=float, default=math.inf,
                        help="end the schedule by then, whatever is left (the result then depends on speed)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; 0: torch decides")
    parser.add_argument("--snapshot-steps", type=int, default=250, help="steps between exported snapshots")
    parser.add_argument("--float32", action="store_true", help="compute in float32, not in bfloat16")
    return parser.parse_args()


def evaluate(args: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, held_out: list[SourceFile],
             seen: tuple[int, int]) -> None:
    """Load the exported checkpoint as a user would, print its figures and write the card."""
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    figures = compare_with_gzip(model, tokenizer, held_out, config.max_position_embeddings)
    pairs = samples(model, tokenizer)
    parameters = sum(weight.numel() for weight in model.parameters())
    (args.out / "README.md").write_text(render_card(config, parameters, figures, pairs, seen, args))
    print(f"held-out bits per byte: {figures['model']:.3f}; gzip -9: {figures['gzip_separate']:.3f} "
          f"(one file at a time), {figures['gzip_together']:.3f} (concatenated)")
    for prompt, text in pairs:
        print(f"--- {prompt!r}\n{text}")


def main() -> None:
    """Run all steps."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    training_files, held_out = split_files(stdlib_files())
    documents = training_documents(training_files, args.seed)
    config = ModelConfig()
    tokenizer = train_tokenizer(documents, config.vocab_size)
    stream = encode_stream(tokenizer, documents)
    print(f"{len(documents)} documents, {len(stream)} tokens; {len(held_out)} files held out", flush=True)
    model = DemoModel(config)

    def snapshot(weights: dict[str, Tensor]) -> None:
        export(weights, config, tokenizer, args.out)

    main_tokens = train(model, stream, Phase(args.tokens, 1.0, args.minutes), args, snapshot)
    closing_stream = encode_stream(tokenizer, closing_documents(documents, args.seed))
    closing_tokens = train(model, closing_stream, Phase(CLOSING_TOKENS, 0.2), args, snapshot)
    export(model.state_dict(), config, tokenizer, args.out)
    evaluate(args, config, tokenizer, held_out, (main_tokens, closing_tokens))


if __name__ == "__main__":
    main()
