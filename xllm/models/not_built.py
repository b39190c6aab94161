"""Architectures that are known by name and not built, each with what of it is missing."""

from __future__ import annotations

STATES = ("layers that keep a state of each sequence (linear attention, state spaces or convolutions) beside the KV "
          "cache")
INDEXER = "sparse attention, whose indexer chooses the tokens that are read"
WIDE_NORMS = "norms of queries and keys across all heads"
ENCODER = "an encoder beside the decoder, of images, sound or text"
SCALES = "factors of embeddings, residuals, attention and logits"

_MISSING: dict[str, tuple[str, ...]] = {
    STATES: (
        "BambaForCausalLM", "BailingHybridForCausalLM", "FalconH1ForCausalLM", "FalconMambaForCausalLM",
        "GraniteMoeHybridForCausalLM", "JambaForCausalLM", "KimiLinearForCausalLM", "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "MiniMaxForCausalLM", "MiniMaxM1ForCausalLM",
        "MiniMaxText01ForCausalLM", "NemotronHForCausalLM", "OlmoHybridForCausalLM", "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration", "Qwen4ExpForCausalLM", "RecurrentGemmaForCausalLM", "RwkvForCausalLM",
        "Zamba2ForCausalLM", "ZambaForCausalLM", "xLSTMForCausalLM"),
    INDEXER: ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
    "compressed KV caches, their indexer and hyper-connections": ("DeepseekV4ForCausalLM",),
    "attention sinks, biases of experts, a clamped activation and weights in mxfp4": ("GptOssForCausalLM",),
    "attention sinks": ("MiMoV2FlashForCausalLM",),
    WIDE_NORMS: ("MiniMaxM2ForCausalLM", "OlmoeForCausalLM", "FlexOlmoForCausalLM"),
    f"{WIDE_NORMS}, and norms behind each block": ("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    "two attentions a layer, and experts that do nothing": ("LongcatFlashForCausalLM",),
    "norms with a mean and a bias, and the sparsemixer router": ("PhimoeForCausalLM",),
    "norms with a mean, and fused projections that are clamped": ("DbrxForCausalLM",),
    "attention within chunks, layers without positions, and scores on an expert's input": ("Llama4ForCausalLM",),
    SCALES: ("GraniteForCausalLM", "GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    "norms of queries and keys behind their rotation": ("HunYuanDenseV1ForCausalLM", "HunYuanMoEV1ForCausalLM"),
    "adjacent numbers of a head that are rotated together": (
        "Ernie4_5ForCausalLM", "Ernie4_5_MoeForCausalLM", "Glm4ForCausalLM", "GlmForCausalLM"),
    "norms whose weights count from one, and the gelu activation": ("GemmaForCausalLM",),
    "norms on both sides of each block, and the gelu activation": (
        "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3nForCausalLM", "Gemma4ForCausalLM"),
    "fused projections": ("Phi3ForCausalLM",),
}
NOT_BUILT = {name: missing for missing, names in _MISSING.items() for name in names}
WITH_ENCODER = "ForConditionalGeneration"


def missing_of(architecture: str) -> str | None:
    """What this architecture needs and is not built; None: it is unknown."""
    return NOT_BUILT.get(architecture, ENCODER if architecture.endswith(WITH_ENCODER) else None)
