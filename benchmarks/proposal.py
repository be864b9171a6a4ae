"""What the tables of `qkernels/tuning/` and the dispatch's limits would better hold, by a record of `benchmarks.tune`.

    python -m benchmarks.proposal benchmarks/results/tune-....csv      # default: the newest ones

Text for a person to review and paste: nothing is written anywhere.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from qkernels.dispatch import SKINNY, WGMMA, Product

from .choice import Name, choose, record_parser, records_of, times
from .compare import weight_of
from .report import Row, read_csv

Points = dict[Product, dict[Name, float]]
# A configuration that gains less is within the noise, and not worth a line in a table.
WORTH = 0.02


def lines(rows: Iterable[Row], choose: Callable[[Product], Name] = choose) -> list[str]:
    """Where each implementation is the fastest, then the configurations that are faster than the tables'."""
    points = times(rows)
    found = ["fastest implementation, from few rows of x to many:", *_ranges(points)]
    for implementation, grouped_by in ((SKINNY, _skinny_group), (WGMMA, _wgmma_group)):
        found.append(f"{implementation}, faster than what the tables choose by {100 * WORTH:.0f}% and more:")
        found += _better(points, implementation, grouped_by, choose) or ["  nothing"]
    return found


def _ranges(points: Points) -> list[str]:
    found = []
    weights = sorted({_weight(one) for one in points})
    for backward, N, K, blocksize, dtype in weights:
        those = [one for one in points if _weight(one) == (backward, N, K, blocksize, dtype)]
        fastest = [(one.M, min(points[one], key=lambda name: points[one][name])[0]) for one in sorted(those)]
        parts = []
        for name, group in groupby(fastest, key=lambda pair: pair[1]):
            ms = [m for m, _ in group]
            parts.append(f"{name} {ms[0]}" + (f" to {ms[-1]}" if len(ms) > 1 else ""))
        op = "matmul_dx" if backward else "matmul"
        size = weight_of({"rows": N, "columns": K, "blocksize": blocksize})
        found.append(f"  {op} {size} {dtype.removeprefix('torch.')}: {', '.join(parts)}")
    return found


def _weight(product: Product) -> tuple[bool, int, int, int, str]:
    return product.backward, product.N, product.K, product.blocksize, str(product.dtype)


def _better(
    points: Points,
    implementation: str,
    group_of: Callable[[Product], tuple[object, ...]],
    choose: Callable[[Product], Name],
) -> list[str]:
    """A line for each group of points that one entry of a table decides, where another configuration is faster."""
    groups: dict[tuple[object, ...], list[Product]] = {}
    for product in points:
        if choose(product)[0] == implementation and choose(product) in points[product]:
            groups.setdefault(group_of(product), []).append(product)
    found = []
    for group, products in groups.items():
        common = set.intersection(*({n for n in points[one] if n[0] == implementation} for one in products))
        if not common:  # of each M what is measured depends on M, by a weight's rows
            found.append(f"  {group}: no configuration was measured for all of M = {[one.M for one in products]}")
            continue

        def cost(name: Name, products: list[Product] = products) -> float:
            return math.fsum(math.log(points[one][name]) for one in products) / len(products)

        now = math.fsum(math.log(points[one][choose(one)]) for one in products) / len(products)
        best = min(common, key=cost)
        gain = math.exp(now - cost(best)) - 1
        if gain >= WORTH:
            found.append(f"  {group}: {best[1]} by {100 * gain:.1f}% than {choose(products[0])[1]}")
    return found


def _skinny_group(product: Product) -> tuple[object, ...]:
    """The forward table has an entry for M up to 4, 8, 16 and 32, the backward one for M up to 8, 16 and 32."""
    most_rows = 1 << (product.M - 1).bit_length()
    if product.backward:
        return "dX", product.N, product.K, max(8, most_rows)
    return product.N, product.K, max(4, most_rows)


def _wgmma_group(product: Product) -> tuple[object, ...]:
    """M, rows and contraction of the transposed output."""
    return (product.M, product.K, product.N) if product.backward else (product.M, product.N, product.K)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print; 0, or 2 without a record."""
    records = records_of(record_parser("proposal", __doc__).parse_args(arguments))
    for record in records:
        print(f"{record.name}:", *lines(read_csv(record)), sep="\n")
    return 0 if records else 2


if __name__ == "__main__":
    sys.exit(main())
