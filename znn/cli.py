"""The command `znn`: describe, plan, train, infer, bench, trace, convert and info.

Exit codes: 0 done, 2 the user's input was wrong (one line says what), 1 something failed, 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from znn.errors import CheckpointError, DataError, EngineError, PlanError, SpecError
from znn.graph import Graph
from znn.spec import NetworkSpec, as_extent, format_extent

_NET_HELP = (
    "a .toml or .znn file, a checkpoint (.npz), a net of the zoo (scaling_3d, 3d_5, m36, ...), or 'boundary'"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. ZNN_DEBUG=1 in the environment shows tracebacks."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("stopped", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SpecError, DataError, PlanError, CheckpointError) as error:
        return _fail(error, 1 if _disk_failed(error) else 2)
    except OSError as error:
        named = error.filename is not None and error.strerror
        return _fail(f"{error.filename}: {error.strerror}" if named else error, 1)
    except (EngineError, MemoryError, ImportError) as error:
        return _fail(error or "out of memory", 1)
    except Exception as error:  # whatever else goes wrong is ours to explain, in one line
        return _fail(f"{type(error).__name__}: {error} (ZNN_DEBUG=1 shows where)", 1)
    return 0


def _disk_failed(error: Exception) -> bool:
    """Whether the cause is a full or failing disk, which is nobody's wrong input."""
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO)


def _fail(message: object, code: int) -> int:
    if os.environ.get("ZNN_DEBUG") == "1" and isinstance(sys.exc_info()[1], Exception):
        raise
    print(f"znn: {' '.join(str(message).split())}", file=sys.stderr)
    return code


# ---- the nets and extents that users name ---------------------------------------------------------
def load_network(
    name: str, width: int | None = None, kernel: int | None = None, form: str | None = None
) -> NetworkSpec:
    """The network description a user means: a file, a checkpoint, a zoo name or 'boundary'. Raises
    SpecError.
    """
    from znn import zoo
    from znn.checkpoint import load_checkpoint
    from znn.train.nets import boundary_network

    path = Path(name)
    in_file = path.suffix in (".toml", ".znn", ".npz")
    if (in_file or name == "boundary") and (width, kernel, form) != (None, None, None):
        raise SpecError(f"{name}: --width, --kernel and --form are for nets of the zoo")
    if path.suffix == ".npz":
        return load_checkpoint(path).spec
    if in_file:
        return NetworkSpec.load(path)
    return boundary_network() if name == "boundary" else zoo.build(name, width, kernel, form)


def parse_extent(text: str) -> int | tuple[int, ...]:
    """'96', '96,96', '1,96,96' or with x for commas."""
    try:
        numbers = tuple(int(part) for part in text.lower().replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no extent; expected 96, 96,96 or 1,96,96") from None
    if len(numbers) > 3 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no extent; expected one to three positive numbers")
    return numbers[0] if len(numbers) == 1 else numbers


def parse_bytes(text: str) -> int:
    """'800M', '4G', '2.5GiB' or bytes."""
    number = text.strip().rstrip("BbiI")
    factor = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(number[-1:].upper(), 1)
    try:
        value = int(float(number if factor == 1 else number[:-1]) * factor)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; expected 800M, 4G, ...") from None
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no amount of memory; expected a positive one")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a positive whole number")
    return value


def _graph(options) -> Graph:
    spec = load_network(options.net, options.width, options.kernel, options.form)
    if getattr(options, "input", None) is not None:
        return Graph.build(spec, input=as_extent(options.input, "--input", spec.dims))
    return Graph.build(spec, output=_output(options, spec))


def _output(options, spec: NetworkSpec):
    from znn import zoo

    if options.output is not None:
        return as_extent(options.output, "--output", spec.dims)
    return zoo.default_output(options.net) if options.net in zoo.names() else (1, 1, 1)


# ---- the commands ---------------------------------------------------------------------------------
def describe(options) -> None:
    from znn.cost import PHASES, network_cost

    graph = _graph(options)
    print(
        f"{graph.spec.name}: loss {graph.spec.loss}, {graph.parameter_count:,} parameters, field of view "
        + ", ".join(f"{format_extent(graph.field_of_view(name))} ({name})" for name in graph.outputs)
    )
    print(f"\n{'node':<18}{'maps':>5}  {'extent':<16}{'made by'}")
    for node in graph.nodes:
        made = [
            f"{edge.name} from {graph.nodes[edge.source].name} ({_operation(edge)})"
            for edge in graph.incoming(node.index)
        ]
        transfer = f" -> {node.spec.transfer}" if node.spec.kind == "transfer" else ""
        print(
            f"{node.name:<18}{node.maps:>5}  {format_extent(node.extent):<16}"
            f"{', '.join(made) or 'input'}{transfer}"
        )
    images = sum(4 * node.maps * node.extent[0] * node.extent[1] * node.extent[2] for node in graph.nodes)
    print(
        f"\none round of one patch: images {_size(images)} (as many gradients), parameters "
        f"{_size(4 * graph.parameter_count)}"
    )
    for method in ("direct", "fft"):
        cost = network_cost(graph, method)
        phases = ", ".join(f"{phase} {cost.phase(phase).flop / 1e9:.3f}" for phase in PHASES)
        print(
            f"  {method:<7}{cost.flop / 1e9:9.3f} GFLOP ({phases}), spectra kept {_size(cost.spectra_bytes)}"
        )
    _describe_bundles(graph, options)
    if options.draw:
        from znn.draw import draw_graph

        draw_graph(graph, options.draw)
        print(f"drawn into {options.draw}")


def _describe_bundles(graph: Graph, options) -> None:
    """Per layer and pass in bundles of maps: predicted, least possible and measured seconds, and memory."""
    import znn
    from znn import bundled, roofline

    if options.bundle == 1:
        return
    for width in bundled.widths():
        bundled.machine(width)
    before = _resident_bytes()
    with znn.Network(
        graph,
        bundle=options.bundle,
        plan=options.plan,
        threads=options.threads,
        memory_limit=options.memory_limit,
        trace=options.measure,
        progress=_say,
        training=not options.inference,
    ) as network:
        if network.bundle == 1:
            return
        predicted = roofline.rows(graph, network.plan, network.plan_request)
        times = None
        if options.measure:
            times = _traced_rounds(network, options.rounds)
        grown = _resident_bytes() - before
        expected = network.memory()
    peaks = bundled.peaks()
    print(
        f"\nin bundles of {network.bundle} maps, plan from {network.plan.source}; milliseconds of one core and round; bound: "
        f"{peaks.flops / 1e9:.0f} GFLOP/s, {peaks.cache_bytes / 1e9:.0f} GB/s in the last cache, "
        f"{peaks.memory_bytes / 1e9:.0f} GB/s in memory, of the method named"
    )
    print(roofline.table(predicted, times))
    parts = ", ".join(f"{name} {_size(count)}" for name, count in vars(expected).items())
    print(f"memory {_size(expected.total)} ({parts})" + (f"; measured {_size(grown)}" if times else ""))


def _traced_rounds(network, rounds: int) -> dict:
    """Seconds by layer and pass: the median of some rounds after two that warm up."""
    from znn import roofline

    inputs, targets = (
        _random_images(network.graph, names) for names in (network.graph.inputs, network.graph.outputs)
    )
    traces = []
    for _ in range(rounds + 2):
        if network.plan_request.training:
            network.train_step(inputs, targets)
        else:
            network.forward(inputs)
        network.sync()
        traces.append(network.trace())
    return roofline.measured(traces[2:])


def _resident_bytes() -> int:
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not held
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _operation(edge) -> str:
    size = edge.kernel or edge.window
    text = edge.kind if size is None else f"{edge.kind} {format_extent(size)}"
    return text if edge.sparsity == (1, 1, 1) else f"{text} sparsity {format_extent(edge.sparsity)}"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def plan(options) -> None:
    import znn
    from znn.files import atomic_write

    graph = _graph(options)
    with znn.Network(
        graph,
        threads=options.threads,
        bundle=options.bundle,
        plan=options.method,
        memory_limit=options.memory_limit,
        progress=_say,
        training=not options.inference,
    ) as net:
        print(net.plan)
        if net.bundle != 1:
            print(f"memory {_size(net.memory().total)}")
        if options.exhaustive:
            print(_exhaustive(net))
        if options.save:
            with atomic_write(options.save, "w") as file:
                file.write(net.plan.to_json())
            print(f"saved as {options.save}")


def _exhaustive(net) -> str:
    """The plan beside the best that there is."""
    from znn.plan import exhaustive_search

    if net.bundle == 1:
        raise SpecError("--exhaustive is for bundles of maps; expected --bundle 8 or auto")
    found = exhaustive_search(net.graph, net.plan, net.plan_request)
    lines = [f"\n{'layer':<12}{'chosen':<24}{'ms/round':>10}  {'best of all':<24}{'ms/round':>10}{'ratio':>8}{'timed':>7}"]
    for row in found:
        a, b = row.seconds[0], row.best_seconds[0]
        lines.append(f"{row.layer:<12}{row.chosen:<24}{a * 1e3:>10.3f}  {row.best:<24}{b * 1e3:>10.3f}{a / b:>8.3f}{row.candidates:>7}")
    a, b = sum(row.seconds[0] for row in found), sum(row.best_seconds[0] for row in found)
    lines.append(f"{'all':<36}{a * 1e3:>10.3f}  {'':<24}{b * 1e3:>10.3f}{a / b:>8.3f}")
    return "\n".join(lines)


def train(options) -> None:
    from znn.train import Progress, Settings, run_job

    names = {
        field: getattr(options, field)
        for field in (
            "hold_out",
            "target",
            "patches",
            "optimiser",
            "rate",
            "momentum",
            "weight_decay",
            "schedule",
            "warm_up",
            "elastic",
            "rounds",
            "minutes",
            "validate_every",
            "keep_every",
            "balance",
            "seed",
            "threads",
            "bundle",
            "plan",
            "sum",
            "tensorboard",
        )
    }
    spec = None if options.net is None else load_network(options.net)
    if options.rounds is None and options.minutes is None:
        names["minutes"] = 5.0
    if options.output is not None:
        names["output"] = as_extent(options.output, "--output", 2 if spec is None else spec.dims)
    settings = Settings(
        images=tuple(options.images),
        labels=tuple(options.labels),
        masks=tuple(options.masks),
        validation_regions=tuple(options.validation_region),
        validation_images=tuple(options.validation_images),
        validation_labels=tuple(options.validation_labels),
        validation_masks=tuple(options.validation_masks),
        augment=not options.no_augment,
        **names,
    )
    folder = Path(options.folder or Path("runs") / ("boundary" if spec is None else spec.name))
    print(f"training in {folder} on {', '.join(options.images) or 'a synthetic volume of cells'}", flush=True)
    summary = run_job(settings, folder, spec, options.fresh, progress=Progress(sys.stderr))
    print(
        f"{summary['rounds']} rounds in {summary['seconds'] / 60:.1f} min; "
        f"pixel error on {summary['voxels']:,} voxels of "
        f"{summary['measured_on']}: {summary['pixel_error']:.2%} (calling everything one class: "
        f"{summary['trivial_error']:.2%})"
    )
    if "rand_error" in summary:
        print(
            f"adapted Rand error of cells within sections: {summary['rand_error']:.3f} (boundaries cut at "
            f"{summary['rand_threshold']})"
        )
    print(f"see {folder / 'sections.png'}, {folder / 'learning-curve.png'}, {folder / 'last.npz'}")


def infer(options) -> None:
    from znn.infer import infer as run
    from znn.train import Progress, read_volume

    progress = Progress(sys.stderr)
    result = run(
        options.checkpoint,
        read_volume(options.images),
        options.out,
        patch=None if options.patch is None else as_extent(options.patch, "--patch", 2),
        borders=options.borders,
        memory_bytes=options.memory,
        raw=options.raw,
        fresh=options.fresh,
        threads=options.threads,
        bundle=options.bundle,
        plan=options.plan,
        progress=lambda done, tiles, seconds: progress.show(done / tiles, seconds, f"tile {done} of {tiles}"),
    )
    progress.done()
    print(
        f"{options.out}: {format_extent(result.output.shape)} in {result.seconds:.1f} s, "
        f"{result.voxels_per_s:,.0f} voxels/s, "
        f"{result.computed} tiles of {format_extent(result.patch)}"
    )


def bench(options) -> None:
    threads = _flat(options.threads) or sorted({1, len(os.sched_getaffinity(0))})
    if options.against:
        return _bench_against(options, threads)
    import numpy as np

    import znn

    graph = _graph(options)
    inputs, gradients = _random_images(graph, graph.inputs), _random_images(graph, graph.outputs)
    methods = options.methods or ["model", "direct", "fft", "bundled"]
    cases = [(method, count) for method in methods for count in threads]
    rounds, phase = options.rounds or 7, "infer" if options.forward else "train"
    nets = [znn.Network(graph, threads=count, training=not options.forward, **_engine_of(method)) for method, count in cases]
    samples: list[list[float]] = [[] for _ in cases]
    try:
        for net in nets:
            net.forward(inputs, phase=phase)
        for _ in range(rounds + 1):  # interleaved; the first round of each warms up
            for net, times in zip(nets, samples):
                started = time.perf_counter()
                if not options.forward:
                    net.backward(gradients)
                net.forward(inputs, phase=phase)
                times.append(time.perf_counter() - started)
                net.sync()
    finally:
        for net in nets:
            net.close()
    print(
        f"{graph.spec.name}, "
        f"output {', '.join(format_extent(graph.node(name).extent) for name in graph.outputs)}, "
        f"a round is {'forward' if options.forward else 'backward + forward'}, "
        f"median of {rounds} interleaved rounds"
    )
    print(f"{'method':<18}{'threads':>8}{'s/round':>12}{'spread':>9}{'output voxels/s':>18}")
    for (method, count), times in zip(cases, samples):
        median = float(np.median(times[1:]))
        spread = (np.percentile(times[1:], 75) - np.percentile(times[1:], 25)) / median
        print(f"{method:<18}{count:>8}{median:>12.4g}{spread:>9.0%}{graph.output_voxels / median:>18,.0f}")


def _bench_against(options, threads: Sequence[int]) -> None:
    """Seconds, memory and results beside those of another program, each in processes of its own."""
    import dataclasses
    import tempfile

    from znn.bench import compare as comparing

    graph = _graph(options)
    sides = [_side(method) for method in options.methods or ["bundled:autotune"]]
    protocol = comparing.PROTOCOL
    if options.rounds:
        protocol = dataclasses.replace(protocol, min_rounds=options.rounds, max_rounds=options.rounds, max_s=1e9)
    title = f"{graph.spec.name}, output {', '.join(format_extent(graph.node(name).extent) for name in graph.outputs)}"
    with tempfile.TemporaryDirectory(prefix="znn-bench-") as folder:
        graph.spec.save(Path(folder) / "net.toml")
        problem = {
            "network": str(Path(folder) / "net.toml"),
            "output": list(graph.node(graph.outputs[0]).extent),
            "phase": "forward" if options.forward else "round",
        }
        try:
            found = [
                comparing.compare(title, problem, sides, options.against, count, protocol, _say) for count in threads
            ]
        except comparing.CompareError as error:
            raise SpecError(str(error)) from None
    print(comparing.to_text(found))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _side(method: str):
    """A plan's name as a side of a comparison: of the paper's engine, or bundled[:PLAN]."""
    from znn.bench.compare import Side

    engine = _engine_of(method)
    if "bundle" in engine:
        return Side(f"ZNN {method}", "znn_bundled", engine)
    return Side(f"ZNN {method}", "znn", engine)


def _flat(lists) -> list[int]:
    return sorted({count for counts in lists or [] for count in counts})


def parse_counts(text: str) -> list[int]:
    """Numbers separated by commas."""
    return [_positive(part) for part in text.split(",")]


def _engine_of(method: str) -> dict:
    """A plan of the paper's engine, or, as bundled or bundled:PLAN, of the one with bundles of maps."""
    engine, _, plan_name = method.partition(":")
    if engine == "bundled":
        return {"bundle": "auto", "plan": plan_name or "model"}
    return {"plan": method}


def _random_images(graph: Graph, names: Sequence[str]) -> dict:
    import numpy as np

    rng = np.random.default_rng(0)
    nodes = [graph.node(name) for name in names]
    return {node.name: rng.standard_normal((node.maps, *node.extent), dtype=np.float32) for node in nodes}


def trace(options) -> None:
    import znn

    graph = _graph(options)
    inputs, targets = _random_images(graph, graph.inputs), _random_images(graph, graph.outputs)
    with znn.Network(
        graph, plan=options.plan, bundle=options.bundle, threads=options.threads, trace=True
    ) as net:
        for _ in range(options.rounds):
            net.train_step(inputs, targets)
        net.sync()
        result = net.trace()
    print(result.report())
    result.save(options.save)
    print(f"saved as {options.save}; open it at https://ui.perfetto.dev")


def convert(options) -> None:
    from znn.checkpoint import load_checkpoint
    from znn.infer import dense

    from_torch, to_torch = (str(path).endswith((".pt", ".pth")) for path in (options.net, options.out))
    parameters = None
    if from_torch:
        from znn.torch import files

        spec, parameters = files.read(options.net, load_network(options.state_of) if options.state_of else None)
    else:
        spec = load_network(options.net, options.width, options.kernel, options.form)
        if to_torch and options.net.endswith(".npz"):
            parameters = load_checkpoint(options.net).parameters
    spec = dense(spec) if options.dense else spec
    if to_torch:
        from znn.torch import files

        files.write(options.out, spec, parameters)
    elif from_torch and options.out.endswith(".npz"):
        _save_parameters(options.out, spec, parameters)
    else:
        spec.save(options.out)
    print(f"{options.out}: {spec.name}, {len(spec.nodes)} nodes, {len(spec.edges)} edges")


def _save_parameters(path: str, spec, parameters: dict) -> None:
    import znn

    with znn.Network(spec, output=1, parameters=parameters) as net:
        znn.save_checkpoint(path, net)


def info(options) -> None:
    import importlib
    import platform
    from importlib import metadata

    import numpy as np

    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        cpu = next(
            (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown"
        )
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    print(
        f"machine   {cpu}, {len(os.sched_getaffinity(0))} usable of {os.cpu_count()} hardware threads, "
        f"{_size(memory['MemTotal'])} memory ({_size(memory['MemAvailable'])} available)"
    )
    print(f"system    {platform.platform()}, Python {platform.python_version()}, NumPy {np.__version__}")
    try:
        core = importlib.import_module("znn._core")
        for name, value in sorted(core.build_info().items()):
            print(f"core      {name}: {value}")
    except ImportError as error:
        print(f"core      missing ({error}); build it: pip install -e . (needs a C++20 compiler)")
    else:
        print(f"core      instruction set: {core.isa()}")
        print(f"fftw      {_fftw()}")
    for module, (extra, purpose) in _LIBRARIES.items():
        package = {"skimage": "scikit-image"}.get(module, module)
        try:
            print(f"library   {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"library   {package} missing, needed for {purpose}; pip install '{extra}'")


_LIBRARIES = {
    "pyfftw": ("znn", "FFTW, unless the system has it"),
    "pandas": ("znn", "tables of records"),
    "matplotlib": ("znn", "figures"),
    "psutil": ("znn", "the memory of measured processes"),
    "tifffile": ("znn[data]", "TIFF stacks"),
    "h5py": ("znn[data]", "HDF5"),
    "zarr": ("znn[data]", "Zarr"),
    "skimage": ("znn[data]", "checking the Rand error"),
    "torch": ("znn[torch]", "znn.torch and comparisons with PyTorch"),
    "tensorboard": ("znn[tensorboard]", "event files (znn train --tensorboard)"),
}


def _fftw() -> str:
    from znn import fftw
    from znn.errors import PlanError

    try:
        return fftw.load()
    except PlanError as error:
        return f"missing: {error}"


# ---- the parser -----------------------------------------------------------------------------------
def _parser() -> argparse.ArgumentParser:
    from importlib import metadata

    parser = argparse.ArgumentParser(
        prog="znn",
        description="Train 2D and 3D ConvNets on CPUs as a graph of tasks.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="znn COMMAND --help shows options and examples.\n"
        "exit codes: 0 done, 1 failed, 2 wrong input, 130 stopped by Ctrl-C",
    )
    try:
        version = metadata.version("znn")
    except metadata.PackageNotFoundError:
        version = "(not installed)"
    parser.add_argument("--version", action="version", version=f"znn {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_describe,
        _add_plan,
        _add_train,
        _add_infer,
        _add_bench,
        _add_trace,
        _add_convert,
        _add_info,
    ):
        add(commands)
    return parser


def _command(commands, function, help_text: str, *examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        function.__name__,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(f"  znn {example}" for example in examples),
    )
    parser.set_defaults(command=function)
    return parser


def _add_net(parser, output: bool = True) -> None:
    parser.add_argument("net", help=_NET_HELP)
    parser.add_argument("--width", type=_positive, help="maps of the hidden layers (zoo)")
    parser.add_argument("--kernel", type=_positive, help="side of the kernels (zoo)")
    parser.add_argument("--form", choices=("dense", "strided"), help="max-filters or max-pooling (zoo)")
    if output:
        parser.add_argument(
            "--output",
            type=parse_extent,
            metavar="EXTENT",
            help="output patch: 12 (cube; square for 2D nets), y,x or z,y,x",
        )


def parse_bundle(text: str) -> int | str:
    """Maps per bundle: a number or auto."""
    return text if text == "auto" else _positive(text)


def _add_engine(parser, plan_default: str = "model", bundle: int | str = 1) -> None:
    parser.add_argument("--threads", type=_positive, help="workers; default: one per usable physical core")
    parser.add_argument(
        "--bundle",
        type=parse_bundle,
        default=bundle,
        metavar="MAPS",
        help=f"maps per bundle: 1 (the paper's engine), 8, with AVX-512 16, or auto, the fastest (default {bundle})",
    )
    parser.add_argument(
        "--plan",
        default=plan_default,
        metavar="PLAN",
        help=f"model, autotune, a method or a saved plan (default {plan_default})",
    )


def _add_describe(commands) -> None:
    parser = _command(
        commands,
        describe,
        "show a net: layers, extents, field of view, parameters, work, time and memory",
        "describe scaling_3d --width 20",
        "describe 3d_5 --output 8 --measure --threads 1",
        "describe my-net.toml --output 1,96,96 --draw net.svg",
        "describe 3d_5 --input 80",
    )
    _add_net(parser)
    parser.add_argument(
        "--input", type=parse_extent, metavar="EXTENT", help="input patch, instead of --output"
    )
    parser.add_argument("--draw", metavar="FILE", help="draw the graph: .svg, .png, .pdf or .dot")
    parser.add_argument(
        "--measure", action="store_true", help="run rounds, and show measured times and memory beside the predicted"
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="rounds measured (default 5)")
    _add_engine(parser, bundle="auto")
    _add_memory_limit(parser)
    _add_inference(parser)


def _add_memory_limit(parser) -> None:
    parser.add_argument(
        "--memory-limit",
        type=parse_bytes,
        metavar="SIZE",
        help="memory that a network of bundles may take, e.g. 1GiB: spectra are made anew where that costs least",
    )


def _add_inference(parser) -> None:
    parser.add_argument("--inference", action="store_true", help="of forward passes alone, instead of training rounds")


def _add_plan(commands) -> None:
    parser = _command(
        commands,
        plan,
        "choose each layer's convolution method by measuring on this machine",
        "plan scaling_3d --width 20 --save plan.json",
        "plan my-net.toml --output 8 --method model",
        "plan 3d_5 --output 8 --memory-limit 700MiB",
        "plan 3d_5 --output 8 --inference --save infer.json",
        "plan 3d_3 --output 8 --exhaustive      # how far from the best of all candidates?",
    )
    _add_net(parser)
    parser.add_argument("--method", default="autotune", help="autotune (default), model, or a method everywhere")
    parser.add_argument(
        "--bundle", type=parse_bundle, default="auto", metavar="MAPS", help="maps per bundle: 1, 8, with AVX-512 16, or auto (default)"
    )
    parser.add_argument("--threads", type=_positive, help="workers; default: one per usable physical core")
    parser.add_argument("--save", metavar="FILE", help="save the plan as JSON, for --plan FILE elsewhere")
    parser.add_argument(
        "--exhaustive", action="store_true", help="time all candidates, minutes, and compare the choice with the best"
    )
    _add_memory_limit(parser)
    _add_inference(parser)


def _add_train(commands) -> None:
    from znn.train.job import RATES, Settings
    from znn.train.loop import SCHEDULES
    from znn.train.volumes import TARGETS

    default = Settings()
    parser = _command(
        commands,
        train,
        "train a boundary-detection (or any other) net on image stacks",
        "train",
        "train --images volume.tif --labels labels.tif --hold-out 6 --minutes 10",
        "train --net my-net.toml --images a.h5:raw b.h5:raw --labels a.h5:seg b.h5:seg --output 4,32,32",
        "train --images a.tif --labels a-labels.tif --validation-region 24:30,0:256,:",
        "train --images a.tif --labels a-labels.tif --validation-images b.tif --validation-labels b-labels.tif",
        "train --optimiser adam --elastic 4 --schedule step --tensorboard",
        "train --rounds 2000 --sum ordered     # bit-identical, whatever happens on the way",
    )
    data = parser.add_argument_group("data (without it: a synthetic volume of cells)")
    data.add_argument(
        "--images", nargs="+", default=[], metavar="FILE", help="stacks: .tif, .npy, .h5:DATASET, .zarr"
    )
    data.add_argument(
        "--labels", nargs="+", default=[], metavar="FILE", help="labels, one file for each of the images"
    )
    data.add_argument(
        "--masks", nargs="+", default=[], metavar="FILE", help="where labels are to be trusted (not 0)"
    )
    data.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="last sections of each volume kept for validation (default: a fifth, unless one of the next options says what)",
    )
    data.add_argument(
        "--validation-region",
        action="append",
        default=[],
        metavar="[N@]Z,Y,X",
        help="a box kept for validation, in voxels from 0: 24:30,0:256,: (with several volumes 2@24:30,0:256,: for the "
        "second); may be given several times",
    )
    for name in ("images", "labels", "masks"):
        data.add_argument(
            f"--validation-{name}", nargs="+", default=[], metavar="FILE", help=f"{name} of volumes for validation only"
        )
    data.add_argument("--target", choices=TARGETS, default=default.target)
    net = parser.add_argument_group("network")
    net.add_argument("--net", help=_NET_HELP + " (default: boundary)")
    net.add_argument(
        "--output",
        type=parse_extent,
        metavar="EXTENT",
        help="output patch (default: 96 voxels wide for 2D nets, 4,32,32 for 3D nets)",
    )
    net.add_argument("--patches", type=_positive, default=default.patches, help="patches a round (default 1)")
    how = parser.add_argument_group("training")
    how.add_argument("--minutes", type=float, help="train for so long (default 5, unless --rounds is given)")
    how.add_argument("--rounds", type=_positive, help="train so many rounds")
    how.add_argument("--optimiser", choices=sorted(RATES), default=default.optimiser, help="default sgd")
    how.add_argument(
        "--rate",
        type=float,
        help="learning rate (default " + ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items()) + ")",
    )
    how.add_argument("--momentum", type=float, default=default.momentum, help=f"default {default.momentum}")
    how.add_argument("--weight-decay", type=float, default=default.weight_decay)
    how.add_argument(
        "--schedule", choices=SCHEDULES, default=default.schedule, help=f"of the rate (default {default.schedule})"
    )
    how.add_argument(
        "--warm-up",
        type=float,
        default=default.warm_up,
        metavar="SHARE",
        help=f"share of the run over which the rate rises (default {default.warm_up})",
    )
    how.add_argument("--balance", action="store_true", help="give rare classes more weight")
    how.add_argument(
        "--no-augment", action="store_true", help="no flips, transpositions, deformation and intensity jitter"
    )
    how.add_argument(
        "--elastic",
        type=float,
        default=default.elastic,
        metavar="VOXELS",
        help="deform patches elastically, by so many voxels (default 0: not)",
    )
    how.add_argument("--validate-every", type=_positive, default=default.validate_every, metavar="ROUNDS")
    how.add_argument(
        "--keep-every", type=_positive, metavar="ROUNDS", help="keep a checkpoint every so many rounds"
    )
    how.add_argument("--seed", type=int, default=default.seed)
    _add_engine(how, bundle="auto")
    how.add_argument(
        "--sum",
        choices=("wait-free", "locked", "ordered"),
        default=default.sum,
        help="ordered: bit-identical results for any number of threads",
    )
    parser.add_argument(
        "--folder", help="where the run lives (default: runs/NET); a run found there is resumed"
    )
    parser.add_argument("--fresh", action="store_true", help="discard the run found in the folder")
    parser.add_argument(
        "--tensorboard", action="store_true", help="also write event files (pip install 'znn[tensorboard]')"
    )


def _add_infer(commands) -> None:
    from znn.infer import BORDERS

    parser = _command(
        commands,
        infer,
        "run a trained net over a whole volume",
        "infer runs/boundary/best.npz volume.tif boundaries.tif",
        "infer last.npz big.h5:raw out.h5 --memory 4G --patch 1,512,512",
    )
    parser.add_argument("checkpoint", help="a checkpoint (.npz)")
    parser.add_argument("images", help="the volume: .tif, .npy, .h5:DATASET, .zarr")
    parser.add_argument("out", help="output file: .tif, .npy, .h5 or .zarr")
    parser.add_argument(
        "--patch", type=parse_extent, metavar="EXTENT", help="output patch (default: the fastest that fits)"
    )
    parser.add_argument("--borders", choices=BORDERS, default="mirror")
    parser.add_argument(
        "--memory",
        type=parse_bytes,
        metavar="SIZE",
        help="most memory to take, e.g. 4G, output apart (default: half of what is free)",
    )
    parser.add_argument(
        "--raw", action="store_true", help="values of the output node instead of probabilities"
    )
    parser.add_argument("--fresh", action="store_true", help="do not go on with an interrupted run")
    _add_engine(parser, bundle="auto")


def _add_bench(commands) -> None:
    parser = _command(
        commands,
        bench,
        "measure seconds per round of one net by method and threads, or beside PyTorch",
        "bench scaling_3d --width 10",
        "bench 3d_5 --output 8 --methods fft bundled bundled:autotune --threads 1,2",
        "bench 3d_5 --output 8 --threads 1,2 --against torch",
        "bench my-net.toml --output 4,32,32 --against torch --forward",
    )
    _add_net(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="PLAN",
        help="plans to compare, bundled or bundled:PLAN for the engine with bundles of maps "
        "(default: model direct fft bundled; with --against: bundled:autotune)",
    )
    parser.add_argument(
        "--threads", nargs="+", type=parse_counts, help="numbers of workers, e.g. 1,2 (default: 1 and all)"
    )
    parser.add_argument(
        "--against",
        choices=("torch",),
        help="also PyTorch: checked results, seconds and ratio over interleaved rounds, memory",
    )
    parser.add_argument("--forward", action="store_true", help="forward passes only, without training")
    parser.add_argument(
        "--rounds", type=_positive, help="rounds of each (default 7; with --against as many as it takes)"
    )


def _add_trace(commands) -> None:
    parser = _command(
        commands,
        trace,
        "record who ran which task when, for https://ui.perfetto.dev",
        "trace scaling_3d --width 10 --save trace.json",
    )
    _add_net(parser)
    parser.add_argument("--rounds", type=_positive, default=3, help="rounds recorded (default 3)")
    parser.add_argument("--save", default="trace.json", metavar="FILE", help="default trace.json")
    _add_engine(parser, bundle="auto")


def _add_convert(commands) -> None:
    parser = _command(
        commands,
        convert,
        "write a net in another format: .toml or .znn, its parameters for or from PyTorch: .pt, .npz",
        "convert old.znn new.toml",
        "convert runs/boundary/last.npz net.toml",
        "convert 3d_5 dense.toml --dense",
        "convert runs/boundary/last.npz weights.pt",
        "convert sequential.pt start.npz",
        "convert weights.pt start.npz --state-of net.toml",
    )
    _add_net(parser, output=False)
    parser.add_argument(
        "out",
        help="the file to write: .toml or .znn; .pt (a state dict of znn.torch.to_torch), or, from a .pt, .npz "
        "(a checkpoint)",
    )
    parser.add_argument(
        "--state-of", metavar="NET", help="the net whose state dict a .pt file holds (default: it holds a Sequential)"
    )
    parser.add_argument(
        "--dense", action="store_true", help="turn max-pooling into max-filtering with sparsity"
    )


def _add_info(commands) -> None:
    _command(commands, info, "show the machine, the build, the libraries, and what is missing", "info")
