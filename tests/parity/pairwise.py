"""Few cases in which every pair of values that the rules allow meets."""

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from random import Random
from typing import Any

Pair = frozenset[tuple[str, Any]]


def pairwise(
    dimensions: Mapping[str, Sequence[Any]],
    is_valid: Callable[[dict[str, Any]], bool],
    seed: int = 0,
    candidates: int = 20,
    tries: int = 1000,
) -> tuple[list[dict[str, Any]], set[Pair]]:
    """Valid cases, greedily chosen (Cohen et al. 1997), and the pairs in none of them: no valid case was found.

    Each case has a pair that no earlier one has; of several ``candidates`` with it, the one with most new pairs is
    taken. A pair counts as impossible after ``tries`` random completions that are not valid.
    """
    random = Random(seed)
    order = [
        frozenset([(one, value), (other, its)])
        for one, other in combinations(dimensions, 2)
        for value in dimensions[one]
        for its in dimensions[other]
    ]
    missing, impossible, cases = set(order), set[Pair](), list[dict[str, Any]]()
    for pair in order:
        if pair not in missing:
            continue
        found: list[dict[str, Any]] = []
        for _ in range(tries):
            case = {name: random.choice(values) for name, values in dimensions.items()} | dict(pair)
            if is_valid(case):
                found.append(case)
                if len(found) == candidates:
                    break
        if not found:
            impossible.add(pair)
            missing.discard(pair)
            continue
        best = max(found, key=lambda case: len(pairs_of(case) & missing))
        cases.append(best)
        missing -= pairs_of(best)
    return cases, impossible - set[Pair]().union(*map(pairs_of, cases))


def pairs_of(case: Mapping[str, Any]) -> set[Pair]:
    """All pairs of values of two dimensions."""
    return {frozenset(pair) for pair in combinations(case.items(), 2)}
