"""Megatron's ``.bin``/``.idx`` byte format, version 1: what reading and writing share.

``.bin`` holds raw tokens. ``.idx``, little-endian: ``MMIDIDX\\0\\0``; u64 version = 1; u8 dtype code; u64 number of
sequences S; u64 D = documents + 1; then, from byte 34 and unaligned, i32 lengths[S] in tokens, i64 pointers[S] in
bytes, i64 document indices[D] in sequences (first 0, last S). As a rule a document is one sequence.
"""

import struct
from typing import Any

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}

UINT16_VOCABULARY = 65_500
"""Megatron's limit: vocabularies below it are stored as uint16."""

LONGEST_SEQUENCE = 2**31 - 1
BLOCK = 1 << 20
"""Entries that full passes handle at a time, which bounds their memory."""


def best_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 for vocabularies under 65,500, else int32, as Megatron does."""
    return np.dtype("<u2") if vocab_size < UINT16_VOCABULARY else np.dtype("<i4")
