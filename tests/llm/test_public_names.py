"""What `import xllm` offers, and what it must not cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import xllm

PUBLIC = ["AsyncLLM", "CompletionOutput", "EmbeddingOutput", "EngineConfig", "KVStoreClient", "LLM", "PoolingParams",
          "RequestOutput", "SamplingParams", "StructuredOutput", "__version__"]


def test_public_names_are_frozen():
    assert sorted(xllm.__all__) == PUBLIC
    assert all(getattr(xllm, name) is not None for name in PUBLIC)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LLMs"):
        _ = xllm.LLMs


def test_version_is_the_project_s():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{xllm.__version__}"\n' in pyproject


def test_import_is_light():
    code = ("import sys; import xllm; xllm.SamplingParams; xllm.EngineConfig; xllm.RequestOutput;"
            "heavy = {'torch', 'transformers', 'tokenizers', 'numpy', 'jinja2'} & sys.modules.keys();"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
