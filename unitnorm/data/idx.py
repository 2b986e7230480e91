"""IDX, the file format of MNIST, Fashion-MNIST, KMNIST and others, raw or gzipped.

Change here which files a folder must hold and how they are read. A header is never believed: it
only says how much to ask for, so that neither a lying header nor a gzip bomb takes more memory than
the file deserves.

The format: two zero bytes, the type (8: unsigned bytes), the number of dimensions, each dimension
as a big-endian 32-bit number, and then the values, last dimension fastest.
"""

import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unitnorm.data.arrays import MAX_BYTES, Arrays, check
from unitnorm.errors import UserError

# Each may also be gzipped, with .gz at the end; without it wins where both are there.
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_KINDS = {1: "a labels file", 3: "an images file"}


def any_in(folder: Path) -> bool:
    """Whether the folder holds at least one of the four files, so that IDX must be meant."""
    return any(os.path.isfile(folder / f"{name}{end}") for name in FILES for end in ("", ".gz"))


def find_files(folder: Path) -> tuple[Path, ...]:
    """The paths of the four files, in the order of `FILES`.

    Raises:
      UserError: if the folder or one of the files is missing.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: expected a folder of four IDX files, found no folder")
    paths = []
    for name in FILES:
        for path in (folder / name, folder / f"{name}.gz"):
            if os.path.isfile(path):
                paths.append(path)
                break
        else:
            raise UserError(f"{folder}: expected the file {name} or {name}.gz, found neither")
    return tuple(paths)


def read_all(paths: tuple[Path, ...]) -> Arrays:
    """Reads and checks the four files of a data set, given in the order of `FILES`.

    The number of classes is the highest training label plus one.

    Raises:
      UserError: naming the file, what was expected and what was found.
    """
    with ThreadPoolExecutor() as pool:
        train_images, train_labels, test_images, test_labels = pool.map(read, paths, (3, 1, 3, 1))
    classes = int(train_labels.max(initial=0)) + 1
    return check(
        Arrays(train_images, train_labels, test_images, test_labels, classes),
        [str(path) for path in paths],
    )


def read(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Reads one file, raw or gzipped: its first bytes tell, not its name.

    Raises:
      UserError: if it cannot be read, is damaged, or is not an IDX file of `ndim` dimensions.
    """
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= MAX_BYTES + 16 else b""
    except OSError as problem:
        raise UserError(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    if size and not content:
        raise UserError(f"{path}: expected at most {MAX_BYTES} values, found {size} bytes")
    if not content.startswith(b"\x1f\x8b"):
        return parse(io.BytesIO(content).read, ndim, str(path))
    unzip = zlib.decompressobj(wbits=31)  # gzip, with its checksum

    def take(limit: int) -> bytes:
        nonlocal content
        values = unzip.decompress(content, limit)
        content = unzip.unconsumed_tail
        return values

    try:
        values = parse(take, ndim, str(path))
        if not unzip.eof or unzip.unused_data:
            raise zlib.error("its end is missing" if not unzip.eof else "more follows its end")
    except zlib.error as problem:
        raise UserError(
            f"{path}: expected a whole gzip file, found a damaged one ({problem}); "
            "put a good copy in its place"
        ) from problem
    return values


def parse(take: Callable[[int], bytes], ndim: int, name: str) -> NDArray[np.uint8]:
    """Parses an IDX stream of unsigned bytes that must end where its header says.

    Args:
      take: gives the next bytes of the stream, as many as asked for unless it ends before.
      ndim: dimensions expected: 3 for images (n, height, width), 1 for labels (n,).
      name: what errors call the stream.

    Raises:
      UserError: on another magic number, a short or long stream, or more than `MAX_BYTES` values.
    """
    magic = bytes([0, 0, 8, ndim])
    header = take(4 + 4 * ndim)
    if header[:4] != magic[: len(header)]:
        raise UserError(
            f"{name}: expected {_KINDS[ndim]} with IDX magic number {int.from_bytes(magic)}, "
            f"found {_describe(header[:4])}"
        )
    if len(header) < 4 + 4 * ndim:
        raise UserError(
            f"{name}: expected an IDX header of {4 + 4 * ndim} bytes, found {len(header)} bytes "
            "in all; the file is truncated"
        )
    shape = struct.unpack(f">{ndim}I", header[4:])
    size = math.prod(shape)
    if size > MAX_BYTES:
        raise UserError(
            f"{name}: expected at most {MAX_BYTES} values, found a header that announces "
            f"{' x '.join(map(str, shape))}; the file is damaged or too large"
        )
    values = take(size + 1)
    if len(values) != size:
        found = f"only {len(values)}" if len(values) < size else "more"
        raise UserError(
            f"{name}: expected {size} bytes after the header, which announces "
            f"{' x '.join(map(str, shape))}, found {found}; the file is "
            f"{'truncated' if len(values) < size else 'damaged'}"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _describe(magic: bytes) -> str:
    kind = next((kind for ndim, kind in _KINDS.items() if magic == bytes([0, 0, 8, ndim])), None)
    return f"{int.from_bytes(magic)} (bytes {magic.hex(' ')})" + (f", {kind}" if kind else "")
