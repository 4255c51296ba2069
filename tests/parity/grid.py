"""The grid of layouts: pairs of all values that the rules allow, chosen by no hand."""

from itertools import count
from typing import Any

from tests.parity.cases import LAYOUT, Case, is_valid, simplest
from tests.parity.pairwise import Pair, pairwise

MODEL: dict[str, Any] = {
    "model.num_hidden_layers": 8,
    "model.num_attention_heads": 4,
    "model.attention_bias": True,
    "model.norm_gain_scale": 20.0,
    "train.sequence_length": 16,
}
"""Of all cases of the grid, besides the simplest values."""

SLOW = ("train.compile",)
"""Not in the sample: each value of them takes many times as long."""

MASKS = ("none", "some of all ranks", "all of a rank")


def dimensions(sample: bool) -> dict[str, tuple[Any, ...]]:
    layout = {dimension.name: dimension.values for dimension in LAYOUT if not (sample and dimension.name in SLOW)}
    return layout | {
        "model.vocab_size": (17, 127, 517),
        "model.tie_word_embeddings": (False, True),
        "model.num_key_value_heads": (1, 2),
        "microbatches": (1, 4),
        "masks": MASKS,
    }


def case_of(values: dict[str, Any]) -> Case:
    """The whole case. A rank has nothing but masked targets in a step where its samples are documents of one token."""
    rest = {name: value for name, value in values.items() if name != "masks"}
    documents = "of one token, every other sample" if values["masks"] == "all of a rank" else "long"
    masks = {"data.document_mask": values["masks"] != "none", "documents": documents}
    return simplest() | MODEL | masks | rest


def cases(sample: bool, seed: int = 0) -> tuple[list[Case], set[Pair]]:
    """Cases in which every pair of values is that can be, and the pairs that cannot: the rules refuse them."""
    found, impossible = pairwise(dimensions(sample), lambda values: is_valid(case_of(values)), seed)
    return [case_of(values) for values in found], impossible


def full_grid(layouts: int = 60) -> list[Case]:
    """Pairwise cases of one seed after another, until there are so many different layouts on more than one rank."""
    found: dict[tuple[Any, ...], Case] = {}
    for seed in count():
        for case in cases(sample=False, seed=seed)[0]:
            found.setdefault(layout_of(case), case)
        if len(found) >= layouts:
            return list(found.values())
    raise AssertionError


def layout_of(case: Case) -> tuple[Any, ...]:
    return tuple(case[dimension.name] for dimension in LAYOUT)
