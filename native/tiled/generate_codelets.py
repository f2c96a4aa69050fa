#!/usr/bin/env python3
"""Write the transform codelets: straight-line discrete Fourier transforms of one extent, vectorised across maps.

    generate_codelets.py OUTPUT_DIRECTORY PARTS

writes codelets_0.inc ... codelets_{PARTS-1}.inc (functions, balanced by size) and codelets_table.inc (their declarations
and a table by extent). Per extent n there are four functions that loop over lines of vectors `V` (one lane per map):

    r2c_n      n real values           -> n/2 + 1 complex ones, X[f] = sum_j x[j] exp(-2 pi i f j / n)
    forward_n  n complex values        -> n complex ones, the same sum
    inverse_n  n complex values        -> n complex ones, x[j] = sum_f X[f] exp(+2 pi i f j / n), unscaled
    c2r_n      n/2 + 1 complex values  -> n real ones, the same sum

Method: the transform is carried out symbolically by decimation in time (in frequency for c2r) over every factorisation
of n, with common subexpressions shared, zeros and Hermitian symmetry propagated and unused results dropped; the
factorisation with the fewest operations is printed in the order in which it was built, so that one butterfly at a time
is live (Frigo, "A fast Fourier transform compiler", PLDI 1999).
"""
from __future__ import annotations

import functools
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Optional

EXTENTS = [*range(1, 33), 40, 48, 56, 64]

Real = Optional[int]                  # index of an expression, None is the constant zero
Complex = tuple[Real, Real]
ZERO: Complex = (None, None)


class Expressions:
    """A directed acyclic graph of real expressions with hash consing; negations are pushed outwards."""

    def __init__(self) -> None:
        self.nodes: list[tuple] = []
        self._index: dict[tuple, int] = {}

    def _make(self, *key: object) -> int:
        if key not in self._index:
            self._index[key] = len(self.nodes)
            self.nodes.append(key)
        return self._index[key]

    def load(self, place: str) -> int:
        return self._make("load", place)

    def neg(self, a: Real) -> Real:
        if a is None:
            return None
        node = self.nodes[a]
        if node[0] == "neg":
            return node[1]
        if node[0] == "sub":
            return self._make("sub", node[2], node[1])
        return self._make("neg", a)

    def add(self, a: Real, b: Real) -> Real:
        if a is None or b is None:
            return b if a is None else a
        if self.nodes[b][0] == "neg":
            return self.sub(a, self.nodes[b][1])
        if self.nodes[a][0] == "neg":
            return self.sub(b, self.nodes[a][1])
        return self._make("add", min(a, b), max(a, b))

    def sub(self, a: Real, b: Real) -> Real:
        if b is None:
            return a
        if a is None:
            return self.neg(b)
        if a == b:
            return None
        if self.nodes[b][0] == "neg":
            return self.add(a, self.nodes[b][1])
        if self.nodes[a][0] == "neg":
            return self.neg(self.add(self.nodes[a][1], b))
        return self._make("sub", a, b)

    def mul(self, factor: float, a: Real) -> Real:
        if a is None or abs(factor) < 1e-14:
            return None
        if factor < 0:
            return self.neg(self.mul(-factor, a))
        if abs(factor - 1) < 1e-14:
            return a
        if self.nodes[a][0] == "neg":
            return self.neg(self.mul(factor, self.nodes[a][1]))
        return self._make("mul", round(factor, 15), a)

    def cadd(self, x: Complex, y: Complex) -> Complex:
        return self.add(x[0], y[0]), self.add(x[1], y[1])

    def csub(self, x: Complex, y: Complex) -> Complex:
        return self.sub(x[0], y[0]), self.sub(x[1], y[1])

    def cscale(self, factor: float, x: Complex) -> Complex:
        return self.mul(factor, x[0]), self.mul(factor, x[1])

    def conj(self, x: Complex) -> Complex:
        return x[0], self.neg(x[1])

    def times_i(self, x: Complex) -> Complex:
        return self.neg(x[1]), x[0]

    def rotate(self, x: Complex, turn: Fraction) -> Complex:
        """x * exp(2 pi i turn), without multiplications at quarters of a turn and with two at eighths."""
        turn %= 1
        while turn >= Fraction(1, 4):
            x, turn = self.times_i(x), turn - Fraction(1, 4)
        if turn == 0 or x == ZERO:
            return x
        if turn == Fraction(1, 8) and None not in x:
            root = math.sqrt(0.5)
            return self.mul(root, self.sub(x[0], x[1])), self.mul(root, self.add(x[0], x[1]))
        c, s = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        return (self.sub(self.mul(c, x[0]), self.mul(s, x[1])), self.add(self.mul(c, x[1]), self.mul(s, x[0])))


@functools.cache
def factorisations(n: int) -> list[tuple[int, ...]]:
    """Ordered factorisations of n into radices; primes are done directly."""
    if n == 1:
        return [()]
    radices = [p for p in (2, 3, 4, 5, 7, 8) if n % p == 0]
    if not radices:
        radices = [next(p for p in range(2, n + 1) if n % p == 0)]
    return [(p, *rest) for p in radices for rest in factorisations(n // p)]


SMALL = {4: (2, 2), 8: (2, 2, 2)}     # radices that are themselves butterflies of butterflies


def dft_prime(e: Expressions, x: list[Complex], sign: int) -> list[Complex]:
    """A prime extent by the symmetry of +f and -f: half the multiplications of the plain sum."""
    n = len(x)
    if n == 2:
        return [e.cadd(x[0], x[1]), e.csub(x[0], x[1])]
    half = n // 2
    sums = [e.cadd(x[j], x[n - j]) for j in range(1, half + 1)]
    differences = [e.csub(x[j], x[n - j]) for j in range(1, half + 1)]
    out: list[Complex] = [ZERO] * n
    if n == 3:                        # x0 - s/2 needs no second sum
        out[0] = e.cadd(x[0], sums[0])
        even = e.csub(x[0], e.cscale(0.5, sums[0]))
        odd = e.times_i(e.cscale(sign * math.sqrt(0.75), differences[0]))
        return [out[0], e.cadd(even, odd), e.csub(even, odd)]
    out[0] = functools.reduce(e.cadd, sums, x[0])
    for f in range(1, half + 1):
        even, odd = x[0], ZERO
        for j in range(1, half + 1):
            angle = 2 * math.pi * (j * f % n) / n
            even = e.cadd(even, e.cscale(math.cos(angle), sums[j - 1]))
            odd = e.cadd(odd, e.cscale(sign * math.sin(angle), differences[j - 1]))
        odd = e.times_i(odd)
        out[f], out[n - f] = e.cadd(even, odd), e.csub(even, odd)
    return out


def dft(e: Expressions, x: list[Complex], sign: int, radices: tuple[int, ...]) -> list[Complex]:
    """X[f] = sum_j x[j] exp(sign 2 pi i f j / n) by decimation in time; real input gives Hermitian output."""
    n = len(x)
    if n == 1:
        return list(x)
    p, q = radices[0], n // radices[0]
    if q == 1 and p not in SMALL:
        out = dft_prime(e, x, sign)
    elif q == 1:
        out = dft(e, x, sign, SMALL[p])
    else:
        parts = [dft(e, x[r::p], sign, radices[1:]) for r in range(p)]
        out = [ZERO] * n
        for f in range(q):
            column = [e.rotate(parts[r][f], Fraction(sign * r * f, n)) for r in range(p)]
            out[f::q] = dft(e, column, sign, (p,))
    if all(value[1] is None for value in x):
        for f in range(n // 2 + 1, n):
            out[f] = e.conj(out[n - f])
        out[0] = (out[0][0], None)
        if n % 2 == 0:
            out[n // 2] = (out[n // 2][0], None)
    return out


def inverse_hermitian(e: Expressions, x: list[Complex], radices: tuple[int, ...]) -> list[Real]:
    """x[j] = sum_f X[f] exp(+2 pi i f j / n) of Hermitian X, real, by decimation in frequency."""
    n = len(x)
    if n == 1:
        return [x[0][0]]
    p, q = radices[0], n // radices[0]
    if q == 1:
        if p in SMALL:
            return inverse_hermitian(e, x, SMALL[p])
        if n == 2:
            return [e.add(x[0][0], x[1][0]), e.sub(x[0][0], x[1][0])]
        out: list[Real] = [None] * n
        for j in range(n // 2 + 1):
            even, odd = x[0][0], None
            for f in range(1, n // 2 + 1):
                angle = 2 * math.pi * (f * j % n) / n
                even = e.add(even, e.mul(2 * math.cos(angle), x[f][0]))
                odd = e.add(odd, e.mul(2 * math.sin(angle), x[f][1]))
            out[j] = e.sub(even, odd)
            out[-j if j else 0] = e.add(even, odd) if j else out[0]
        return out
    rows: list[list[Complex]] = [[ZERO] * q for _ in range(p)]
    for f in range(q // 2 + 1):
        column = [x[f + j * q] for j in range(p)]
        if f == 0:                    # this column is Hermitian itself
            mixed: list[Complex] = [(v, None) for v in inverse_hermitian(e, column, (p,))]
        else:
            mixed = dft(e, column, +1, (p,))
        for r in range(p):
            value = e.rotate(mixed[r], Fraction(r * f, n))
            rows[r][f] = (value[0], None) if 2 * f == q else value
            if f and 2 * f != q:
                rows[r][q - f] = e.conj(value)
    out = [None] * n
    for r in range(p):
        out[r::p] = inverse_hermitian(e, rows[r], radices[1:])
    return out


Stores = list[tuple[str, Real]]


def complex_at(place: str) -> tuple[str, str]:
    return f"y[{place}]", f"y[{place}+1]"


def build_r2c(e: Expressions, n: int, radices: tuple[int, ...]) -> Stores:
    x = dft(e, [(e.load(f"x[{j}*is]"), None) for j in range(n)], -1, radices)
    return [stored for f in range(n // 2 + 1) for stored in zip(complex_at(f"{2 * f}"), x[f])]


def build_forward(e: Expressions, n: int, radices: tuple[int, ...]) -> Stores:
    x = dft(e, [(e.load(f"x[{j}*is]"), e.load(f"x[{j}*is+1]")) for j in range(n)], -1, radices)
    return [stored for f in range(n) for stored in zip(complex_at(f"{2 * f}"), x[f])]


def build_inverse(e: Expressions, n: int, radices: tuple[int, ...]) -> Stores:
    """A forward transform whose real and imaginary parts are exchanged, on both sides."""
    x = dft(e, [(e.load(f"x[{2 * j + 1}]"), e.load(f"x[{2 * j}]")) for j in range(n)], -1, radices)
    return [stored for f in range(n) for stored in zip(complex_at(f"{f}*os"), reversed(x[f]))]


def build_c2r(e: Expressions, n: int, radices: tuple[int, ...]) -> Stores:
    x: list[Complex] = [ZERO] * n
    for f in range(n // 2 + 1):
        real_only = f == 0 or 2 * f == n
        x[f] = (e.load(f"x[{2 * f}]"), None if real_only else e.load(f"x[{2 * f + 1}]"))
        if not real_only:
            x[n - f] = e.conj(x[f])
    return [(f"y[{j}]", value) for j, value in enumerate(inverse_hermitian(e, x, radices))]


def live_nodes(e: Expressions, stores: Stores) -> set[int]:
    live: set[int] = set()
    stack = [value for _, value in stores if value is not None]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack += [a for a in e.nodes[node][1:] if isinstance(a, int)]
    return live


def operations(e: Expressions, stores: Stores) -> float:
    """Vector instructions: a product used once is fused into its sum."""
    live, uses = live_nodes(e, stores), {}
    for node in live:
        for a in e.nodes[node][1:]:
            if isinstance(a, int):
                uses[a] = uses.get(a, 0) + 1
    kinds = [(e.nodes[node][0], uses.get(node, 0)) for node in live]
    return sum(1.0 if kind != "mul" or used > 1 else 0.2 for kind, used in kinds if kind != "load")


def statements(e: Expressions, stores: Stores) -> list[str]:
    """The expressions in the order in which they were built, loads at first use, stores as soon as possible."""
    live = live_nodes(e, stores)
    places: dict[int, list[str]] = {}
    lines = []
    for place, value in stores:
        if value is None:
            lines.append(f"{place} = V{{}};")
        else:
            places.setdefault(value, []).append(place)
    loaded: set[int] = set()

    def name(node: int) -> str:
        if e.nodes[node][0] == "load" and node not in loaded:
            loaded.add(node)
            lines.append(f"const V t{node} = {e.nodes[node][1]};")
        return f"t{node}"

    for node in sorted(live):
        kind, *arguments = e.nodes[node]
        if kind == "load":
            if node in places:
                name(node)
        else:
            a = name(arguments[-1]) if kind in ("mul", "neg") else name(arguments[0])
            if kind == "mul":
                text = f"{arguments[0]!r}f * {a}"
            elif kind == "neg":
                text = f"-{a}"
            else:
                text = f"{a} {'+' if kind == 'add' else '-'} {name(arguments[1])}"
            lines.append(f"const V t{node} = {text};")
        lines += [f"{place} = t{node};" for place in places.get(node, [])]
    return lines


# Strides only where there is a choice: the other side lies close together, so that addresses are known to the compiler.
STRIDES = {"r2c": ("long is, ", ""), "forward": ("long is, ", ""), "inverse": ("", "long os, "), "c2r": ("", "")}
SIGNATURES = {kind: f"const V* __restrict x, {in_stride}long in_line, V* __restrict y, {out_stride}long out_line, long lines"
              for kind, (in_stride, out_stride) in STRIDES.items()}
BUILDERS = {"r2c": build_r2c, "forward": build_forward, "inverse": build_inverse, "c2r": build_c2r}


def codelet(kind: str, n: int) -> tuple[str, float]:
    """The text of one function and its vector operations per line."""
    best = None
    for radices in factorisations(n):
        e = Expressions()
        stores = BUILDERS[kind](e, n, radices)
        cost = operations(e, stores)
        if best is None or cost < best[0]:
            best = (cost, e, stores)
    cost, e, stores = best
    body = "\n".join("        " + line for line in statements(e, stores))
    return (f"void {kind}_{n}({SIGNATURES[kind]}) {{\n    for (; lines > 0; --lines, x += in_line, y += out_line) {{\n{body}\n"
            f"    }}\n}}\n"), cost


def main() -> None:
    directory, parts = Path(sys.argv[1]), int(sys.argv[2])
    directory.mkdir(parents=True, exist_ok=True)
    texts: list[list[str]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    declarations, rows = [], []
    for n in sorted(EXTENTS, reverse=True):
        costs = []
        for kind in SIGNATURES:
            text, cost = codelet(kind, n)
            part = sizes.index(min(sizes))
            texts[part].append(text)
            sizes[part] += len(text)
            declarations.append(f"void {kind}_{n}({SIGNATURES[kind].replace(' __restrict', '')});")
            if kind != "inverse":  # as many as forward
                costs.append(f"{cost:.0f}")
        rows.append(f"    {{{n}, {', '.join(f'{kind}_{n}' for kind in SIGNATURES)}, {', '.join(costs)}}},")
    for part, functions in enumerate(texts):
        (directory / f"codelets_{part}.inc").write_text("\n".join(functions))
    (directory / "codelets_table.inc").write_text(
        "\n".join(declarations) + "\n\nconst Codelets kCodelets[] = {\n" + "\n".join(reversed(rows)) + "\n};\n")


if __name__ == "__main__":
    main()
