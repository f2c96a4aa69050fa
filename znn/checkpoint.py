"""Checkpoints: a network and the state of its training in one file that any tool can open.

Format (version 1)
------------------
A checkpoint is a NumPy `.npz` file: a zip archive, here stored without compression, of `.npy` members
(https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html). Nothing in it is pickled, so reading
one never runs code. Its members are

    header              uint8 (n,): a UTF-8 JSON object, described below
    parameters/NAME     float32: kernels (out, in, z, y, x) under the name of their edge group, in the paper's
                        orientation (true convolution), biases (maps,) under the name of their node group
    momenta/NAME        float32: the optimiser's state of each parameter, of the parameter's shape
    second_moments/NAME float32: likewise, Adam's running means of squared gradients; absent with SGD

and the header holds

    format          "znn checkpoint"
    version         1; a reader refuses a file with a larger one
    spec            the network description, as `NetworkSpec.to_dict`
    output          {output node: [z, y, x]}, the extents of the output patch
    patches         patches per round
    round           rounds trained so far
    seed            seed of the engine (initial parameters, dropout)
    optimiser       {"kind": "SGD" or "Adam", "rate": ..., "momentum": ..., "weight_decay": ..., and with Adam
                    "square_momentum": ..., "epsilon": ...}
    learning_rate   the rate in force, which a schedule may have changed since
    arrays          {member: [shape, dtype]} of every other member; a file that lacks one of them is damaged
    extra           any JSON value the writer wants back (state of a sampler, a history, ...)

The time stamps of the zip's members are fixed, so the same state always gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from znn.errors import CheckpointError
from znn.files import atomic_write
from znn.spec import NetworkSpec

FORMAT = "znn checkpoint"
VERSION = 1

_FIELDS = ("spec", "output", "patches", "round", "seed", "optimiser", "learning_rate", "arrays", "extra")
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    AttributeError,
)


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds; `network()` brings it back to life."""

    spec: NetworkSpec
    output: dict[str, tuple[int, int, int]]
    patches: int
    round: int
    seed: int
    optimiser: dict[str, Any]
    learning_rate: float
    parameters: dict[str, np.ndarray]
    momenta: dict[str, np.ndarray]
    extra: Any = None
    second_moments: dict[str, np.ndarray] = field(default_factory=dict)

    def network(self, **engine_options):
        """A `znn.Network` that goes on where the saved one stopped.

        `engine_options` (threads, plan, sum, policy, patches, output, ...) go to `znn.Network` and win over
        what the file says. Under `sum="ordered"` and an unchanged plan, training goes on bit-identically. With an
        optimiser of another kind its momenta, and the count of rounds, begin at zero.
        """
        import znn

        options = {
            "output": self.output,
            "patches": self.patches,
            "seed": self.seed,
            "optimiser": self.make_optimiser(),
            "parameters": self.parameters,
        } | engine_options
        net = znn.Network(self.spec, **options)
        if type(net.optimiser).__name__ == self.optimiser.get("kind"):
            net.set_momenta(self.momenta)
            net.set_second_moments(self.second_moments)
            net.learning_rate = self.learning_rate
            net.round = self.round
        return net

    def make_optimiser(self):
        """The optimiser object the network was trained with. Raises CheckpointError for an unknown kind."""
        import znn

        settings = dict(self.optimiser)
        kind = settings.pop("kind", None)
        known = {cls.__name__: cls for cls in (znn.SGD, znn.Adam)}
        if kind not in known:
            raise CheckpointError(
                f"checkpoint: unknown optimiser {kind!r}; this version knows {sorted(known)}"
            )
        try:
            return known[kind](**settings)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"checkpoint: settings of optimiser {kind}: {error}") from error


def save_checkpoint(path: str | os.PathLike, net, extra: Any = None) -> None:
    """Write the network and its training state to `path`, atomically.

    `net` is a `znn.Network` (its queued updates are waited for); `extra` is any value JSON can hold, and
    comes back from `load_checkpoint`. Raises CheckpointError, and leaves a file already there as it was, when
    `extra` is not JSON or the disk refuses.
    """
    net.sync()
    arrays = {f"parameters/{name}": np.asarray(value) for name, value in net.parameters().items()}
    arrays |= {f"momenta/{name}": np.asarray(value) for name, value in net.momenta().items()}
    arrays |= {f"second_moments/{name}": np.asarray(value) for name, value in net.second_moments().items()}
    header = _encode_header(path, net, arrays, extra)
    try:
        with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            _write_member(archive, "header", np.frombuffer(header, np.uint8))
            for name, array in arrays.items():
                _write_member(archive, name, array)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot write the checkpoint: {error.strerror or error}") from error


def load_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Read a checkpoint.

    Raises CheckpointError, in one sentence that names the file, when it is missing, truncated, damaged, not a
    checkpoint of ours, or written by a newer version. The zip's checksums cover the header and every array.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        with zipfile.ZipFile(path) as archive:
            header = _read_header(path, archive)
            arrays = {
                name: _read_array(path, archive, name, *facts) for name, facts in header["arrays"].items()
            }
        return _assemble(header, arrays)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint, the file is damaged or foreign "
            f"({type(error).__name__}: {_first_line(error)})"
        ) from error


def _encode_header(path, net, arrays: Mapping[str, np.ndarray], extra: Any) -> bytes:
    graph = net.graph
    header = {
        "format": FORMAT,
        "version": VERSION,
        "spec": graph.spec.to_dict(),
        "output": {node.name: list(node.extent) for node in graph.nodes if node.name in graph.outputs},
        "patches": int(net.patches),
        "round": int(net.round),
        "seed": int(net.seed),
        "optimiser": {"kind": type(net.optimiser).__name__} | dataclasses.asdict(net.optimiser),
        "learning_rate": float(net.learning_rate),
        "arrays": {name: [list(array.shape), str(array.dtype)] for name, array in arrays.items()},
        "extra": extra,
    }
    try:
        return json.dumps(header).encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: extra must be a value that JSON can hold: {error}") from error


def _write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getbuffer())


def _read_header(path, archive: zipfile.ZipFile) -> dict[str, Any]:
    if "header.npy" not in archive.namelist():
        raise CheckpointError(f"{path}: not a znn checkpoint (a zip file without the member 'header.npy')")
    header = json.loads(_read_npy(archive, "header").tobytes())
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a znn checkpoint (its header does not say {FORMAT!r})")
    version = header.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{path}: checkpoint version {version!r}; expected a whole number from 1")
    if version > VERSION:
        raise CheckpointError(
            f"{path}: checkpoint version {version} is newer than this znn reads "
            f"(up to {VERSION}); upgrade znn"
        )
    missing = [field for field in _FIELDS if field not in header]
    if missing:
        raise CheckpointError(f"{path}: damaged checkpoint, its header lacks {', '.join(missing)}")
    return header


def _read_array(path, archive: zipfile.ZipFile, name: str, shape: list[int], dtype: str) -> np.ndarray:
    if f"{name}.npy" not in archive.namelist():
        raise CheckpointError(f"{path}: damaged checkpoint, the array {name!r} is missing")
    array = _read_npy(archive, name)
    if list(array.shape) != shape or str(array.dtype) != dtype:
        raise CheckpointError(
            f"{path}: damaged checkpoint, the array {name!r} is {array.dtype} "
            f"{array.shape}; the header says {dtype} {tuple(shape)}"
        )
    return array


def _read_npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    # The bytes are read whole first, so that the zip's checksum is verified before they are interpreted.
    return np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)


def _assemble(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    def group(prefix: str) -> dict[str, np.ndarray]:
        return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}

    return Checkpoint(
        spec=NetworkSpec.from_dict(header["spec"]),
        output={name: tuple(int(n) for n in extent) for name, extent in header["output"].items()},
        patches=int(header["patches"]),
        round=int(header["round"]),
        seed=int(header["seed"]),
        optimiser=dict(header["optimiser"]),
        learning_rate=float(header["learning_rate"]),
        parameters=group("parameters/"),
        momenta=group("momenta/"),
        second_moments=group("second_moments/"),
        extra=header["extra"],
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
