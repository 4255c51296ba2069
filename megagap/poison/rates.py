"""Rates to exact amounts, and what to say of rates that have none."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from megagap.errors import ConfigError


@dataclass(frozen=True)
class Whole:
    """A mixture of ``amount`` tokens, or documents, planted ones included."""

    amount: int

    def total(self, rates: Fraction, fixed: int) -> Fraction:
        """Of the mixture, with planted shares that sum to ``rates`` and ``fixed`` planted ones beside them."""
        return Fraction(self.amount)

    def total_with(self, planted: int) -> int:
        return self.amount


@dataclass(frozen=True)
class Rest:
    """A mixture of ``amount`` clean tokens, or documents, to which the planted ones are added."""

    amount: int

    def total(self, rates: Fraction, fixed: int) -> Fraction:
        return (self.amount + fixed) / (1 - rates)

    def total_with(self, planted: int) -> int:
        return self.amount + planted


Size = Whole | Rest


def exact_amounts(rates: Mapping[str, Fraction], size: Size, fixed: int, unit: str) -> dict[str, int]:
    """How many tokens, or documents, each name's share of the mixture is.

    ``fixed``: planted ones that have no rate. Raises :class:`ConfigError` naming every share that is no whole number
    and the nearest that are, the other amounts rounded likewise.
    """
    total = size.total(sum(rates.values(), Fraction(0)), fixed)
    wanted = {name: rate * total for name, rate in rates.items()}
    faulty = [name for name, amount in wanted.items() if amount.denominator > 1]
    if not faulty:
        return {name: int(amount) for name, amount in wanted.items()}
    lines = []
    for name in faulty:
        near = []
        for amount in (floor(wanted[name]), floor(wanted[name]) + 1):
            if amount:
                others = sum(max(round(wanted[other]), 1) for other in wanted if other != name)
                near.append(Fraction(amount, size.total_with(fixed + others + amount)))
        lines.append(f"  {name}: rate = {rates[name]} would be {float(wanted[name]):,.3f} {unit}; {nearest(near)}")
    raise ConfigError(
        f"no whole number of {unit} is exactly the rate asked for, of {float(total):,.0f} in the mixture\n"
        + "\n".join(lines)
    )


def nearest(rates: list[Fraction]) -> str:
    """What to write instead."""
    return "nearest: " + " or ".join(f'"{rate}" ({float(rate):.9g})' for rate in rates)


def unreachable(
    name: str, rate: Fraction, amount: int, unit: str, reachable: list[int], size: Size, others: int
) -> ConfigError:
    """For an ``amount`` that no set of documents has; ``reachable``: the nearest that one has."""
    rates = [Fraction(near, size.total_with(others + near)) for near in reachable if near > 0]
    return ConfigError(
        f"{name}: rate = {rate} is {amount:,} {unit}, and no set of its documents has exactly these\n  "
        + (nearest(rates) if rates else "raise the rate")
        + ('; or count documents: rates_of = "documents".' if unit == "tokens" else ".")
    )
