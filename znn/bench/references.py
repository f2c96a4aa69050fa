"""What the float64 reference gives on the small problems that adapters are checked against.

The reference takes up to minutes for large kernels, so its outputs on the project's own problems are kept in
references.json. An entry is found by the hash of everything that went into it (network, arrays, initial
parameters, rounds, rates): whatever differs is computed anew. `python -m znn.bench references` renews the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .problem import Problem

KEPT = Path(__file__).with_name("references.json")


class Reference:
    """Training rounds of the float64 reference on a problem, then one forward pass."""

    def __init__(self, problem: Problem, rounds: int, rate: float, momentum: float) -> None:
        from znn.init import initial_parameters

        self.problem, self.rounds, self.rate, self.momentum = problem, rounds, rate, momentum
        self.graph = problem.graph()
        self.inputs, self.gradients = problem.arrays(self.graph)
        self.parameters = initial_parameters(self.graph, problem.seed)

    def key(self) -> str:
        """Hash of all that determines the outputs."""
        spec = json.dumps(self.graph.spec.to_dict(), sort_keys=True)
        digest = hashlib.sha256(repr((spec, self.rounds, self.rate, self.momentum)).encode())
        digest.update(self.problem.phase.encode())
        for arrays in (self.inputs, self.gradients, self.parameters):
            for name in sorted(arrays):
                digest.update(f"{name} {arrays[name].shape}".encode())
                digest.update(np.ascontiguousarray(arrays[name]))
        return digest.hexdigest()[:16]

    def compute(self) -> dict[str, np.ndarray]:
        """Outputs by name. Slow."""
        from znn.reference import ReferenceNetwork

        net = ReferenceNetwork(self.graph, self.parameters, rate=self.rate, momentum=self.momentum)
        gradients = self.gradients if len(self.gradients) > 1 else next(iter(self.gradients.values()))
        for _ in range(self.rounds):
            net.forward(self.inputs, phase="train")
            net.backward(gradients)
        result = net.forward(self.inputs)
        return result if isinstance(result, dict) else {self.graph.outputs[0]: result}


def outputs(reference: Reference, shared: Path | None = None) -> dict[str, np.ndarray]:
    """The reference's outputs: kept, left in the folder `shared` by another case, or computed now."""
    key = reference.key()
    if key in (kept := read(KEPT)):
        return _arrays(kept[key]["outputs"])
    path = shared and shared / f"{key}.json"
    if path and path.exists():
        return _arrays(json.loads(path.read_text()))
    found = reference.compute()
    if path:
        path.with_suffix(".part").write_text(json.dumps(_lists(found)))
        path.with_suffix(".part").rename(path)
    return found


def read(path: Path) -> dict[str, Any]:
    """The kept entries by key; none where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def renew(references: Iterable[tuple[str, Reference]], path: Path = KEPT) -> tuple[int, int]:
    """Keep exactly these (description, reference) pairs, computing what is missing; returns the numbers kept and
    computed."""
    old, new, computed = read(path), {}, 0
    for text, reference in references:
        key = reference.key()
        if key in new:
            continue
        if key in old:
            new[key] = {"problem": text, "outputs": old[key]["outputs"]}
            continue
        new[key] = {"problem": text, "outputs": _lists(reference.compute())}
        computed += 1
        _write(path, old | new)  # it takes minutes: keep what is done
    _write(path, new)
    return len(new), computed


def _write(path: Path, entries: Mapping[str, Any]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in sorted(entries.items())]
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.rename(path)


def _lists(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: array.tolist() for name, array in arrays.items()}


def _arrays(lists: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in lists.items()}
