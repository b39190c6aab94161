"""Train the bundled demo model from the Python standard library.

The model is a Qwen3-architecture network of about five million parameters. Its training text is what every
Python installation carries: the sources and docstrings of the standard library, partly rewritten as ChatML
conversations. Nothing is downloaded. The run is seeded: on one machine the same arguments give the same
model.

    python -m tools.train_demo --out xllm/bundled

The steps: collect the corpus, train a byte-level BPE tokenizer, train the network (Muon for the matrices,
AdamW for the rest), export in Hugging Face format, then compare held-out bits per byte with gzip -9 and write
a model card.
"""
