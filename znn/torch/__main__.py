"""`python -m znn.torch`: one convolution layer, PyTorch's and ours in turns."""

from __future__ import annotations

import argparse
import sys

import torch

from znn.errors import ZnnError
from znn.torch.layers import Problem
from znn.torch.measure import Case, measure

EXAMPLES = """examples:
  python -m znn.torch                                     40 -> 40 maps, kernel 5, extent 48, forward and backward
  python -m znn.torch --maps 32 --kernel 7 --extent 32 --depthwise --padding 3
  python -m znn.torch --dims 2 --maps 64 --kernel 11 --extent 128 --forward
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m znn.torch", description=__doc__.partition(": ")[2], epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=40, help="output maps (40)")
    parser.add_argument("--in-maps", type=int, help="input maps (as many as output maps)")
    parser.add_argument("--kernel", type=int, default=5)
    parser.add_argument("--extent", type=int, default=48, help="of the input image (48)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--padding", type=int, default=0)
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--depthwise", action="store_true")
    parser.add_argument("--forward", action="store_true", help="inference: without the backward pass")
    parser.add_argument("--threads", type=int, help="of both (torch.get_num_threads())")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure for (20)")
    args = parser.parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        print(report(args))
    except ZnnError as error:
        print(f"znn.torch: {error}", file=sys.stderr)
        return 2
    return 0


def report(args: argparse.Namespace) -> str:
    """Medians of both and their ratio."""
    def extent(n: int, depth: int = 1) -> tuple[int, int, int]:
        return (n if args.dims == 3 else depth, n, n)

    groups, padding = args.maps if args.depthwise else 1, extent(args.padding, 0)
    problem = Problem(args.in_maps or args.maps, args.maps, groups, extent(args.extent), extent(args.kernel), (1, 1, 1),
                      padding, padding)
    case = Case(problem, args.dims, args.batch, backward=not args.forward)
    timing = measure(case, args.seconds)
    return "\n".join([f"{case}, {torch.get_num_threads()} threads, medians of {len(timing.torch_s)} rounds in turns",
                      f"PyTorch {torch.__version__}  {timing.theirs * 1e3:9.2f} ms",
                      f"znn ({timing.best})  {timing.ours * 1e3:9.2f} ms",
                      f"ratio  {timing.ratio:.2f}"])


if __name__ == "__main__":
    sys.exit(main())
