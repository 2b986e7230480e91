"""Trained weights as a file: safetensors, with what is needed to build the network and use it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy

from unitnorm.errors import UserError, one_line
from unitnorm.segment.config import SegNetConfig
from unitnorm.segment.model import segnet
from unitnorm.segment.palette import NAMES

FORMAT = "1"  # of the file; raised when an older reader would misread it


class Weights(NamedTuple):
    """What a prediction needs: nested dicts of arrays."""

    params: Any
    stats: Any


class TrainedSegNet(NamedTuple):
    """A network with its weights; the height and width of the images that it was trained on."""

    network: SegNetConfig
    weights: Weights
    update: str
    size: tuple[int, int]


def pack_weights(trained: TrainedSegNet) -> bytes:
    """The content of a file of weights; the same weights are the same bytes."""
    about = {
        "format": FORMAT, "network": trained.network.model_dump_json(), "update": trained.update,
        "height": str(trained.size[0]), "width": str(trained.size[1]), "classes": " ".join(NAMES),
    }  # fmt: skip
    tensors = {name: np.asarray(x) for name, x in _named(trained.weights).items()}
    content = safetensors.numpy.save(tensors, about)
    # the library orders `about` as it happens
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    return content[:8] + header.ljust(end - 8) + content[end:]


def read_weights(path: Path) -> TrainedSegNet:
    """The weights in a file that `pack_weights` made.

    Raises:
      UserError: it is missing, damaged, or something else.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: there are no weights; give a file with --weights, or train first: "
            "unitnorm segment train"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["format"] != FORMAT or about["classes"] != " ".join(NAMES):
            raise KeyError("format")
        network = SegNetConfig.model_validate_json(about["network"])
        like = Weights(*jax.eval_shape(segnet(network).init, jax.random.key(0)))
        wanted = _named(like)
        if {n: x.shape for n, x in tensors.items()} != {n: x.shape for n, x in wanted.items()}:
            raise ValueError("the tensors do not fit the network")
        leaves = [tensors[name] for name in wanted]
        weights = jax.tree.unflatten(jax.tree.structure(like), leaves)
        size = int(about["height"]), int(about["width"])
        return TrainedSegNet(network, weights, about["update"], size)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as problem:
        reason = one_line(f"{type(problem).__name__}: {problem}")[:160]
        raise UserError(
            f"{path}: not the weights of a SegNet of this version ({reason}); expected a file "
            "that `unitnorm segment train` wrote"
        ) from None


def _named(weights: Weights) -> dict[str, Any]:
    """The leaves by their path, such as params/encoders/0/conv/kernel, in the order of the tree."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(weights)
    }
