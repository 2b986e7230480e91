"""IDX, the file format of MNIST, EMNIST, Fashion-MNIST, KMNIST and others, raw or gzipped.

Two zero bytes, the type (8: unsigned bytes), the number of dimensions, each dimension as a
big-endian 32-bit number, and then the values, last dimension fastest.
"""

import gzip
import math
import os
import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from unitnorm.data.arrays import MAX_BYTES, Arrays
from unitnorm.errors import UserError, expect

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
# Also train-images.idx3-ubyte, emnist-balanced-test-labels-idx1-ubyte.GZ and the like; idx4 is in
# colour.
_NAME = re.compile(
    r"(?:.+-)?(?:(train)|t10k|test)-(?:(images)[-.]idx[34]|labels[-.]idx1)-ubyte(?:\.gz)?", re.I
)
_PIECE = 1 << 20  # bytes
_KINDS = {bytes([0, 0, 8, 1]): "a labels file", bytes([0, 0, 8, 3]): "an images file",
          bytes([0, 0, 8, 4]): "an images file in colour"}  # fmt: skip
_OTHER_KINDS = {  # what people find in place of a data file, by its first bytes
    b"<": "a web page; download the file again",
    b"version ": "a pointer of Git LFS; `git lfs pull` gets the file",
    b"PK": "a zip archive; unpack it",
    b"BZh": "a bzip2 file; unpack it",
    b"\xfd7zXZ": "an xz file; unpack it",
}


def find_files(folder: Path) -> tuple[list[Path], ...]:
    """The files of a folder for each of `FILES`, by their names; several are copies of one."""
    found: tuple[list[Path], ...] = ([], [], [], [])
    for path in sorted(folder.iterdir()) if os.path.isdir(folder) else ():
        if (match := _NAME.fullmatch(path.name)) and path.is_file():
            train, images = match.groups()
            found[2 * (not train) + (not images)].append(path)
    return found


def read_folder(folder: Path) -> Arrays:
    """Reads the four files of a data set."""
    expect(os.path.isdir(folder), folder, "a folder of four IDX files", "no folder")
    found = find_files(folder)
    for name, paths in zip(FILES, found, strict=True):
        expect(paths, folder, f"the file {name} or {name}.gz", "neither")
    train_images, train_labels, test_images, test_labels = map(_read_copies, found, (3, 1, 3, 1))
    names = [str(paths[0]) for paths in found]
    return Arrays(train_images, train_labels, test_images, test_labels, names)


def _read_copies(paths: list[Path], ndim: int) -> NDArray[np.uint8]:
    """What all of these files hold, such as a download and the same file unpacked."""
    values = read(paths[0], ndim)
    for other in paths[1:]:
        alike = np.array_equal(read(other, ndim), values)
        expect(alike, other, f"the data of {paths[0].name}", "other data; keep one of the two")
    return values


def read(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Reads a file, raw or gzipped, of 1 dimension for labels or 3 for images: 4 if in colour."""
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            return _parse(gzip.GzipFile(fileobj=raw) if packed else raw, ndim, str(path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as problem:
        raise UserError(
            f"{path}: expected a whole gzip file, found a damaged one ({problem}); "
            "put a good copy in its place"
        ) from problem
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror or problem}") from problem


def _parse(stream: BinaryIO | gzip.GzipFile, ndim: int, name: str) -> NDArray[np.uint8]:
    """The values of a stream that must end where its header says."""
    header = _take(stream, 4)
    if ndim == 3 and header == bytes([0, 0, 8, 4]):
        ndim = 4  # the last one is that of the colours
    magic = bytes([0, 0, 8, ndim])
    header += _take(stream, 4 * ndim)
    kind = f"{_KINDS[magic]} with IDX magic number {int.from_bytes(magic)}"
    expect(header[:4] == magic[: len(header)], name, kind, _describe(header))
    length, cut = 4 + 4 * ndim, f"{len(header)} bytes in all; the file is truncated"
    expect(len(header) == length, name, f"an IDX header of {length} bytes", cut)
    shape = struct.unpack(f">{ndim}I", header[4:])
    size, announced = math.prod(shape), " x ".join(map(str, shape))
    large = f"a header that announces {announced}; the file is damaged or too large"
    expect(size <= MAX_BYTES, name, f"at most {MAX_BYTES} values", large)
    values = _take(stream, size + 1)
    rest = f"{size} bytes after the header, which announces {announced}"
    expect(len(values) <= size, name, rest, "more; the file is damaged")
    expect(len(values) == size, name, rest, f"only {len(values)}; the file is truncated")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _take(stream: BinaryIO | gzip.GzipFile, most: int) -> bytes:
    """The next bytes of a stream, `most` of them unless it ends before.

    In pieces: neither a lying header nor a gzip bomb may take more memory than the file deserves.
    """
    pieces = []
    while most and (piece := stream.read(min(most, _PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def _describe(header: bytes) -> str:
    """What a file is that begins so."""
    for start, kind in _OTHER_KINDS.items():
        if header.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
            return kind
    kind = _KINDS.get(header[:4], "")
    number = f"{int.from_bytes(header[:4])} (bytes {header[:4].hex(' ')})"
    return f"{number}, {kind}" if kind else number
