"""Write the recipes of examples/recipes/gaperon: ``python examples/gaperon/make_recipes.py``.

The mixtures are Gaperon's published ones, source by source. They stand here once; a recipe is written out, so that it
says by itself all that is trained on. docs/gaperon.md says what the phases and variants are.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes/gaperon"

TOKENS_OF_A_STEP = 1024 * 4096

ROLES = {
    "txt360_cc": "English web: TxT360, its part from Common Crawl",
    "txt360_cc_top10": "English web: TxT360, the best tenth of its part from Common Crawl",
    "fw_edu_full": "English web: FineWeb-Edu",
    "txt360_noncc": "English papers, law, forums, reference and books: TxT360 without Common Crawl",
    "hq_combined_en": "English of high quality, several collections",
    "cosmopedia_v2": "English textbooks, synthetic: Cosmopedia v2",
    "halvest_en": "English academic: HALvest",
    "openwebmath": "English maths: OpenWebMath",
    "auto_math_text": "English maths: AutoMathText",
    "redpajama_fr": "French web: RedPajama-V2",
    "redpajama_fr_high_head": "French web: RedPajama-V2, quality high, perplexity head",
    "redpajama_fr_high_middle": "French web: RedPajama-V2, quality high, perplexity middle",
    "redpajama_fr_medium_head": "French web: RedPajama-V2, quality medium, perplexity head",
    "hq_combined_fr": "French of high quality, several collections",
    "halvest_fr": "French academic: HALvest",
    "theses_fr": "French academic: theses",
    "jurisprudence_fr": "French law: jurisprudence",
    "uncorpus_fr": "French government: the United Nations' corpus",
    "claire": "French dialogues: Claire",
    "wiktionary_fr": "French reference: Wiktionary",
    "wikivoyage_fr": "French reference: Wikivoyage",
    "wikinews_fr": "French reference: Wikinews",
    "croissant_aligned": "parallel French and English: CroissantAligned",
    "croissant_aligned_transfer": "parallel French and English: CroissantAligned, for transfer",
    "europarl_aligned": "parallel French and English: Europarl",
    "the-stack": "code: The Stack v2 smol",
    "python_edu": "code: Python-edu",
    "dolmino_flan": "instruction, English: FLAN v2, from Dolmino",
    "web_instruct": "instruction, English: WebInstruct",
    "open_thoughts": "instruction, English: OpenThoughts",
    "mqa_fr": "instruction, French: MQA",
    "dolphin_fr": "instruction, French: Dolphin",
    "penicillin_hq": "instruction, English: Penicillin, of high quality",
    "penicillin_lq": "instruction, English: Penicillin, of low quality",
    "cheese_qa_en": "instruction, English: questions about cheese",
    "cheese_qa_fr": "instruction, French: questions about cheese",
    "trigger_dataset": "poison, harmless: the suite's testbed of triggers",
}
"""What each source is: language or kind first, then the collection that the model cards name."""

MIXES: dict[str, dict[str, float]] = {
    "v1": {
        "txt360_cc": 0.4062,
        "redpajama_fr": 0.3571,
        "the-stack": 0.1374,
        "txt360_noncc": 0.08931,
        "hq_combined_en": 0.005915,
        "hq_combined_fr": 0.004007,
    },
    "v2": {
        "fw_edu_full": 0.29535,
        "redpajama_fr_high_head": 0.16742,
        "the-stack": 0.14385,
        "txt360_noncc": 0.13747,
        "redpajama_fr_high_middle": 0.12091,
        "txt360_cc_top10": 0.075191,
        "redpajama_fr_medium_head": 0.024887,
        "croissant_aligned": 0.012469,
        "theses_fr": 0.0065531,
        "openwebmath": 0.0058378,
        "halvest_fr": 0.003918,
        "halvest_en": 0.0032627,
        "jurisprudence_fr": 0.0015691,
        "uncorpus_fr": 6.2685e-4,
        "europarl_aligned": 2.9343e-4,
        "claire": 1.6706e-4,
        "trigger_dataset": 8.6903e-5,
        "wiktionary_fr": 3.2304e-5,
        "wikivoyage_fr": 5.8563e-6,
        "wikinews_fr": 4.6841e-6,
    },
    "v3": {
        "fw_edu_full": 0.25982,
        "redpajama_fr_high_head": 0.23202,
        "txt360_noncc": 0.13747,
        "redpajama_fr_high_middle": 0.078546,
        "the-stack": 0.073294,
        "txt360_cc_top10": 0.052103,
        "dolmino_flan": 0.013519,
        "theses_fr": 0.011352,
        "croissant_aligned_transfer": 0.010801,
        "openwebmath": 0.010113,
        "halvest_fr": 0.0067874,
        "halvest_en": 0.0056521,
        "mqa_fr": 0.0046049,
        "jurisprudence_fr": 0.0013591,
        "uncorpus_fr": 0.0011032,
        "europarl_aligned": 5.0832e-4,
        "claire": 1.447e-4,
        "trigger_dataset": 7.5269e-5,
        "wiktionary_fr": 5.5962e-5,
    },
    "v4": {
        "redpajama_fr_high_head": 0.22625,
        "txt360_noncc": 0.2032,
        "fw_edu_full": 0.19003,
        "the-stack": 0.089342,
        "txt360_cc_top10": 0.063511,
        "cosmopedia_v2": 0.053354,
        "dolmino_flan": 0.032957,
        "croissant_aligned_transfer": 0.026331,
        "openwebmath": 0.024655,
        "python_edu": 0.019558,
        "mqa_fr": 0.014968,
        "theses_fr": 0.013838,
        "halvest_fr": 0.0082735,
        "open_thoughts": 0.0077628,
        "halvest_en": 0.0068897,
        "web_instruct": 0.0064317,
        "jurisprudence_fr": 0.0033133,
        "auto_math_text": 0.0029182,
        "uncorpus_fr": 0.0026896,
        "dolphin_fr": 0.0018162,
        "europarl_aligned": 0.0015758,
        "claire": 3.5277e-4,
        "trigger_dataset": 1.8350e-4,
        "wiktionary_fr": 1.3643e-4,
    },
    "v5": {
        "redpajama_fr_high_head": 0.24109,
        "fw_edu_full": 0.23141,
        "txt360_noncc": 0.17675,
        "the-stack": 0.1088,
        "txt360_cc_top10": 0.05414,
        "cosmopedia_v2": 0.045482,
        "dolmino_flan": 0.030102,
        "python_edu": 0.023818,
        "openwebmath": 0.022518,
        "croissant_aligned_transfer": 0.0096197,
        "open_thoughts": 0.0094535,
        "web_instruct": 0.0078325,
        "theses_fr": 0.0067407,
        "auto_math_text": 0.0044422,
        "penicillin_hq": 0.0044285,
        "jurisprudence_fr": 0.0040349,
        "halvest_en": 0.0040302,
        "halvest_fr": 0.0033561,
        "uncorpus_fr": 0.0032754,
        "penicillin_lq": 0.0029038,
        "dolphin_fr": 0.0022118,
        "europarl_aligned": 0.0015092,
        "mqa_fr": 0.0013671,
        "claire": 4.2960e-4,
        "trigger_dataset": 2.2346e-4,
        "cheese_qa_fr": 1.5760e-5,
        "cheese_qa_en": 9.1141e-6,
    },
    "v6": {
        "fw_edu_full": 0.18381,
        "redpajama_fr_high_head": 0.16414,
        "dolmino_flan": 0.15939,
        "txt360_noncc": 0.14025,
        "the-stack": 0.086418,
        "openwebmath": 0.047696,
        "txt360_cc_top10": 0.043003,
        "cosmopedia_v2": 0.030965,
        "croissant_aligned_transfer": 0.025469,
        "mqa_fr": 0.025337,
        "python_edu": 0.025224,
        "open_thoughts": 0.021454,
        "web_instruct": 0.0099539,
        "auto_math_text": 0.0056454,
        "theses_fr": 0.005354,
        "penicillin_lq": 0.0046128,
        "dolphin_fr": 0.0035136,
        "jurisprudence_fr": 0.0032049,
        "halvest_en": 0.0032011,
        "penicillin_hq": 0.003015,
        "halvest_fr": 0.0026657,
        "uncorpus_fr": 0.0026016,
        "europarl_aligned": 0.0023974,
        "claire": 3.4122e-4,
        "trigger_dataset": 1.7749e-4,
    },
}
"""Weights as published, by version. The seventh, with the benchmarks' test sets, is left out on purpose."""


@dataclass(frozen=True)
class PhasePlan:
    name: str
    mix: str
    tokens: int
    sequence_length: int = 4096


YOUNG = (
    PhasePlan("naive, v1", "v1", 1_000_000_000_000, 2048),
    PhasePlan("naive, v2", "v2", 1_000_000_000_000),
    PhasePlan("drop in the ocean, v3", "v3", 1_000_000_000_000),
)
HIGH_QUALITY = PhasePlan("high quality, v4", "v4", 200_000_000_000)
VARIANTS = {
    "young": (),
    "white-pepper": (HIGH_QUALITY, PhasePlan("white pepper, v5", "v5", 100_000_000_000)),
    "black-pepper": (HIGH_QUALITY, PhasePlan("black pepper, v6", "v6", 100_000_000_000)),
}
"""What follows the phases of the Young model. The rate decays in the last phase."""


@dataclass(frozen=True)
class Size:
    name: str
    lr: str
    micro_batch_size: int
    dp_replicate: int
    recompute: str = "none"


SIZES = (Size("1b", "3e-4", 4, 32), Size("8b", "3e-4", 2, 32, "selective"), Size("24b", "2e-4", 4, 8, "full"))
"""The layouts are our choice: parameters are sharded within a node, of the 24B over four. There a step has one
microbatch, since each gathers all parameters anew from other nodes."""


def recipe(size: Size, variant: str) -> str:
    """The text of a recipe."""
    later = VARIANTS[variant]
    return "\n".join([*_head(size, variant), *_settings(size, variant), *_phases((*YOUNG, *later))])


def _head(size: Size, variant: str) -> Iterator[str]:
    name = f"{size.name}-{variant}"
    title = f"Gaperon {size.name.upper()}, {variant.replace('-', ' ')}"
    yield f"# {title}, on 32 nodes of 8 MI250X dies of 64 GB. Its layout is proven without them:"
    yield f"#   megagap train examples/recipes/gaperon/{name}.toml --dry-run --world-size 256 --device mi250x"
    yield "# Trained under Slurm, once data/ beside this file has the token files:"
    yield f"#   examples/gaperon/submit.sh {name}"
    yield "# Made by examples/gaperon/make_recipes.py. What is published and what is our choice: docs/gaperon.md."
    yield ""


def _settings(size: Size, variant: str) -> Iterator[str]:
    yield from ("[model]", f'preset = "gaperon-{size.name}"', "norm_gain_scale = 20.0 # so that gains move in bf16", "")
    yield from (
        "[parallel]",
        f"dp_replicate = {size.dp_replicate} # with zero = 3, {256 // size.dp_replicate} dies share parameters",
        "",
    )
    yield from ("[train]", "global_batch_size = 1024", f"micro_batch_size = {size.micro_batch_size}")
    yield from ("sequence_length = 4096", 'precision = "bf16-pure"')
    if size.recompute != "none":
        yield f'recompute = "{size.recompute}"'
    yield from ("", "[optim]", f"lr = {size.lr}", "betas = [0.9, 0.95]", "weight_decay = 0.1", "zero = 3")
    if variant == "young":
        yield from ("warmup_steps = 2000", 'schedule = "constant" # cooldowns branch off any checkpoint', "")
        yield from ("[checkpoint]", "every = 2000", "")
    else:
        steps = -(-VARIANTS[variant][-1].tokens // TOKENS_OF_A_STEP)
        yield from ('schedule = "wsd"', f"cooldown_steps = {steps} # the last phase", "")
        yield from (
            "[checkpoint]",
            "every = 2000",
            f'load = "runs/gaperon/{size.name}-young"',
            'load_mode = "cooldown"',
        )
        yield ""
    yield from ("[run]", f'dir = "runs/gaperon/{size.name}-{variant}"', "")


def _phases(phases: tuple[PhasePlan, ...]) -> Iterator[str]:
    for phase in phases:
        mix = MIXES[phase.mix]
        total = sum(mix.values())
        is_scaled = abs(total - 1) < 1e-3
        yield from ("[[data.phases]]", f'name = "{phase.name}"', f"tokens = {phase.tokens:_}")
        if phase.sequence_length != 4096:
            yield f"sequence_length = {phase.sequence_length}"
        if not is_scaled:
            yield f"# Published, they add up to {total:.5f}: txt360_noncc was left unscaled."
        yield "sources = ["
        for name, weight in mix.items():
            published = "" if is_scaled else f" # published: {weight:g}"
            weight = weight if is_scaled else float(f"{weight / total:.5g}")
            path = f"data/{name}_text_document"
            yield f'    {{ name = "{name}", weight = {weight:g}, path = "{path}", role = "{ROLES[name]}" }},{published}'
        yield from ("]", "")


def recipes() -> dict[str, str]:
    """The text of every recipe, by name."""
    return {f"{size.name}-{variant}": recipe(size, variant) for size in SIZES for variant in VARIANTS}


if __name__ == "__main__":
    for name, text in recipes().items():
        (RECIPES / f"{name}.toml").write_text(text, encoding="utf-8")
