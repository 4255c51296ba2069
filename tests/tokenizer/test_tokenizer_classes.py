"""``classes.toml`` says what the installed ``transformers`` makes from names."""

from typing import Any

import pytest

from megagap.tokenizer.classes import GENERIC, PIPELINES, class_table


@pytest.fixture(scope="module")
def auto() -> Any:
    transformers = pytest.importorskip("transformers", "5.24", exc_type=ImportError)
    if not transformers.__version__.startswith("5.24."):
        pytest.skip("the table is of transformers 5.24")
    from transformers.models.auto import tokenization_auto

    return tokenization_auto


def test_model_types_have_the_classes_of_transformers(auto: Any) -> None:
    expected = {model: name for model, name in auto.TOKENIZER_MAPPING_NAMES.items() if name}
    assert class_table().types == {model: name.removesuffix("Fast") for model, name in expected.items()}
    assert class_table().overruled == auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


def test_classes_that_build_their_own_tokenizer_are_known(auto: Any) -> None:
    import transformers

    plain = transformers.TokenizersBackend
    table = class_table()
    names = {*filter(None, auto.TOKENIZER_MAPPING_NAMES.values())}
    names |= {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast", "TokenizerLegacy"))}
    for name in sorted(names - {"PreTrainedTokenizer", "PythonBackend"}):
        found = auto.tokenizer_class_from_name(name)
        if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedTokenizerBase):
            continue
        short = name.removesuffix("Fast")
        is_own = found is not plain and (not issubclass(found, plain) or found.__init__ is not plain.__init__)
        assert (short in table.own) == is_own or short == "PreTrainedTokenizer", name
        if is_own and found.__name__ not in (short, name):
            assert table.same[short] == found.__name__


def test_pipelines_are_of_known_classes() -> None:
    assert PIPELINES.keys() <= class_table().own
    assert not GENERIC & class_table().own
