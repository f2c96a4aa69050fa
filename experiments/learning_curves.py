#!/usr/bin/env python3
"""The same net on the same data in the same order, trained by ZNN and by PyTorch on the same cores: error against time.

    python experiments/learning_curves.py --images stack.tif --labels labels.tif --hold-out 6 --minutes 5

Without --images it trains on the synthetic volume of cells. One loop trains both (`znn.train.loop.Run`): patches,
augmentation, initial parameters, learning rate, validation and the clock are shared, and only the arithmetic of a round
differs. Each engine runs in a process of its own, one after the other. Results go to
results/MACHINE/learning_curves/NAME-ENGINE.jsonl: a line about the run, then the learning curve. PyTorch is left out
where it is not installed. `python paper_figs/build.py --only learning_curves` draws them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import znn
from znn.bench import provenance
from znn.files import atomic_write
from znn.graph import Graph
from znn.train import (
    Augmentation,
    Evaluator,
    Geometry,
    Limits,
    PatchReader,
    PatchSampler,
    Progress,
    Run,
    Schedule,
    Settings,
    boundary_network,
    load_volumes,
    read_curve,
)

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("znn", "torch")
TRIAL_ROUNDS = 3  # rounds after which PyTorch's memory format is chosen


class TorchTrainer:
    """A network trained by PyTorch, with the methods of `znn.Network` that `znn.train.loop.Run` uses.

    Its patches are one image in (maps, z, y, x); the loss is the binomial one, SGD with momentum the optimiser.
    """

    patches = 1

    def __init__(self, graph: Graph, parameters: dict[str, np.ndarray], optimiser: znn.SGD, channels_last: bool):
        import torch

        from znn.bench.adapters.torch_net import TorchNet

        self.torch, self.graph, self.optimiser, self.seed, self.round = torch, graph, optimiser, 0, 0
        self._net = TorchNet(graph, parameters, torch.device("cpu"), channels_last)
        kernels = [w for name, w in self._net.weights.items() if parameters[name].ndim > 1]
        biases = [w for name, w in self._net.weights.items() if parameters[name].ndim == 1]
        groups = [{"params": kernels, "weight_decay": optimiser.weight_decay}, {"params": biases}]
        self._sgd = torch.optim.SGD(groups, lr=optimiser.rate, momentum=optimiser.momentum)

    @property
    def learning_rate(self) -> float:
        return self._sgd.param_groups[0]["lr"]

    @learning_rate.setter
    def learning_rate(self, rate: float) -> None:
        for group in self._sgd.param_groups:
            group["lr"] = rate

    def _forward(self, image: np.ndarray) -> Any:
        (output,) = self._net.forward({self.graph.inputs[0]: self._net.tensor(image[None])}).values()
        return output

    def forward(self, image: np.ndarray, phase: str = "infer") -> np.ndarray:
        with self.torch.no_grad():
            output = self._forward(image).contiguous().numpy()
        return output[0][:, None] if self._net.flat else output[0]

    def train_step(self, image: np.ndarray, target: np.ndarray, weights: np.ndarray | None = None) -> float:
        output = self._forward(image)
        factors = None if weights is None else self._net.tensor(weights[None])
        loss = self.torch.nn.functional.binary_cross_entropy_with_logits(
            output, self._net.tensor(target[None]), weight=factors, reduction="sum"
        ) / (target.size // target.shape[0])
        self._sgd.zero_grad(set_to_none=True)
        loss.backward()
        self._sgd.step()
        self.round += 1
        return loss.item()


class Unsaved(Run):
    """A run that keeps its curve and no checkpoints: a curve is not resumed."""

    def _save(self, name: str) -> None:
        pass


def torch_trainer(graph: Graph, parameters: dict[str, np.ndarray], optimiser: znn.SGD, sample: Any) -> tuple[Any, str]:
    """PyTorch's network in the memory format that is faster here, and the format's name."""
    seconds = {}
    for channels_last in (False, True):
        net = TorchTrainer(graph, parameters, optimiser, channels_last)
        times = []
        for _ in range(TRIAL_ROUNDS):
            started = time.perf_counter()
            net.train_step(*sample)
            times.append(time.perf_counter() - started)
        seconds[channels_last] = min(times)
    best = min(seconds, key=seconds.get)
    return TorchTrainer(graph, parameters, optimiser, best), "channels last" if best else "channels first"


def train(engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process and return the run's line; the curve is in `options.folder`."""
    spec = znn.NetworkSpec.load(options.net) if options.net else boundary_network()
    settings = Settings(
        images=tuple(options.images), labels=tuple(options.labels), hold_out=options.hold_out, seed=options.seed,
        minutes=options.minutes, output=tuple(options.output), validate_every=options.validate_every,
        schedule="constant", warm_up=0.0, rate=options.rate,
    )
    training, held_out = load_volumes(settings)
    graph = Graph.build(spec, output=settings.output)
    geometry, maps = Geometry.of(graph), graph.node(graph.outputs[0]).maps
    sampler = PatchSampler(PatchReader(training, geometry, maps=maps), settings.seed, Augmentation())
    evaluator = Evaluator(PatchReader(held_out, geometry, maps=maps), spec.loss, settings.validation_tiles)
    optimiser = znn.SGD(settings.rate, settings.momentum, settings.weight_decay)
    parameters = znn.init.initial_parameters(graph, settings.seed)
    if engine == "znn":
        net: Any = znn.Network(
            graph, threads=options.threads, bundle="auto", parameters=parameters, optimiser=optimiser, plan=options.plan
        )
        how = {"version": znn.__version__, "bundle": net.bundle, "plan": str(net.plan)}
    else:
        import torch

        torch.set_num_threads(options.threads)
        net, layout = torch_trainer(graph, parameters, optimiser, sampler.sample(0))
        how = {"version": torch.__version__, "memory_format": layout}
    limits = Limits(minutes=options.minutes, validate_every=settings.validate_every)
    Unsaved(net, sampler, evaluator, options.folder, Schedule(settings.rate, "constant", 0.0), limits,
            progress=Progress(sys.stderr)).train()
    return {
        "kind": "run", "engine": engine, "name": options.name, "threads": options.threads, "network": spec.to_dict(),
        "settings": settings.to_dict(), "data_sha256": digest(options.images + options.labels), "how": how,
        "started": options.started, "machine": provenance.gather(ROOT), "command": shlex.join(sys.argv),
    }


def digest(files: list[str]) -> str | None:
    """SHA-256 over the files, so that a record says which data it is about."""
    if not files:
        return None
    total = hashlib.sha256()
    for name in files:
        total.update(Path(name).read_bytes())
    return total.hexdigest()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="learning_curves.py", description=__doc__.splitlines()[0])
    made.add_argument("--images", nargs="+", default=[], metavar="FILE")
    made.add_argument("--labels", nargs="+", default=[], metavar="FILE")
    made.add_argument("--hold-out", type=int, metavar="N", help="last sections for validation (default: a fifth)")
    made.add_argument("--net", metavar="FILE", help=".toml (default: that of `znn train`); loss binomial")
    made.add_argument("--minutes", type=float, default=5.0, help="for each engine (default 5)")
    made.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    made.add_argument("--threads", type=int, default=provenance.physical_cores(), help="default: all physical cores")
    made.add_argument("--plan", default="model", help="ZNN's plan (default model)")
    made.add_argument("--output", type=int, nargs=3, default=(1, 96, 96), metavar=("Z", "Y", "X"))
    made.add_argument("--rate", type=float, default=0.01)
    made.add_argument("--validate-every", type=int, default=50, metavar="ROUNDS")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--name", default="boundary", help="what the figure calls the task (default boundary)")
    made.add_argument("--results", type=Path, default=ROOT / "results")
    made.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    made.add_argument("--started", default=provenance.now(), help=argparse.SUPPRESS)
    return made


def measure(engine: str, arguments: list[str], options: argparse.Namespace) -> None:
    """Train in a process of its own, then put the run's line and its curve in their place, at once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *arguments, "--engines", engine, "--folder", folder]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
        run = json.loads((Path(folder) / "run.json").read_text()) | {"command": shlex.join(["python", "experiments/learning_curves.py", *arguments])}
        lines = [run, *read_curve(Path(folder) / "curve.jsonl")]
    place = options.results / provenance.machine_id(run["machine"]) / "learning_curves"
    place.mkdir(parents=True, exist_ok=True)
    with atomic_write(place / f"{options.name}-{engine}.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    last = [line for line in lines if line["kind"] == "validation"][-1]
    print(f"{engine:<6} {last['round']:>6} rounds, pixel error {last['pixel_error']:.2%} after {last['seconds'] / 60:.1f} min")


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.folder:
        run = train(options.engines[0], options)
        (options.folder / "run.json").write_text(json.dumps(run))
        return 0
    for engine in options.engines:
        if engine == "torch" and not importlib.util.find_spec("torch"):
            print("torch  not installed (pip install 'znn[torch]'), left out")
            continue
        measure(engine, arguments, options)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (znn.ZnnError, OSError) as error:
        sys.exit(f"learning_curves: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
