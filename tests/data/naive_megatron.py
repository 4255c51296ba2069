"""Megatron's order, written down from its description with plain lists: slow, but obviously correct."""

import math

import numpy as np


def source_samples(documents: list[list[int]], samples: int, length: int, seed: int) -> list[list[int]]:
    """All samples of one source that is built for so many, in order; ``documents`` are those of the split."""
    tokens = sum(map(len, documents))
    epochs = 1
    while epochs * tokens < samples * length + 1:
        epochs += 1
    per_epoch = (tokens - 1) // length
    before_last = ((epochs - 1) * tokens - 1) // length
    separate = epochs > 1 and samples - before_last < int(0.80 * per_epoch)
    random = np.random.RandomState(seed)

    def shuffled(numbers: list[int], dtype: str) -> list[int]:
        array = np.array(numbers, dtype)
        random.shuffle(array)
        return array.tolist()

    once = list(range(len(documents)))
    if separate:
        index = shuffled(once * (epochs - 1), "int32")
        index += shuffled(once, "int32")
    else:
        index = shuffled(once * epochs, "int32")
    stream = [token for document in index for token in documents[document]]
    total = (epochs * tokens - 1) // length
    first = before_last if separate else total
    numbers = shuffled(list(range(first)), "uint32")
    if separate:
        numbers += shuffled(list(range(first, total)), "uint32")
    return [stream[n * length : n * length + length + 1] for n in numbers]


def mixture_choice(weights: list[float], samples: int) -> list[int]:
    shares = [weight / sum(weights) for weight in weights]
    drawn = [0] * len(shares)
    choice = []
    for t in range(samples):
        best = 0
        for i in range(len(shares)):
            if shares[i] * max(t, 1) - drawn[i] > shares[best] * max(t, 1) - drawn[best]:
                best = i
        choice.append(best)
        drawn[best] += 1
    return choice


def mixture_samples(
    sources: list[list[list[int]]], weights: list[float], samples: int, length: int, seed: int
) -> list[list[int]]:
    if len(sources) == 1:
        return source_samples(sources[0], samples, length, seed)[:samples]
    built = [math.ceil(math.ceil(samples * weight / sum(weights)) * 1.005) for weight in weights]
    orders = [
        iter(source_samples(documents, count, length, seed)) for documents, count in zip(sources, built, strict=True)
    ]
    return [next(orders[i]) for i in mixture_choice(weights, samples)]
