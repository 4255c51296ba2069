"""Language identification: by a fastText model at a local path, or by function words, which needs nothing."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from datatrove.pipeline.filters import LanguageFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.lid import FT176LID

from megagap.errors import ConfigError, DataError, library_errors
from megagap.files import is_there, require_fetched, require_regular

if TYPE_CHECKING:
    from datatrove.data import Document

FUNCTION_WORDS = {
    "en": "the of and to in is that for it as with was be by are this from or have an they which not but had his her "
    "their been has were will would there if when can its into than then some these only other also may after such "
    "you your we our what who how must should each between because does where while any about no more on at a",
    "fr": "le la les des du et en un une est que qui dans pour par sur au aux avec ne pas ce cette ces se son sa ses "
    "sont ou il elle ils elles nous vous leur leurs mais plus être été était peut doit fait comme si tout tous toute "
    "dont même sans sous entre où ont avoir aussi donc lorsque afin chaque cela ainsi très votre notre c' d' l' n' "
    "qu' s' j' de a",
    "de": "der die das und ist nicht ein eine einen einem einer eines zu mit den dem des von für auf im sich als auch "
    "es an werden aus er hat dass sie nach wird bei noch wie um sind oder wenn aber durch kann nur über diese dieser "
    "dieses so zum zur vor bis mehr man ich wir ihr sein haben wurde keine",
    "es": "el la los las un una unos unas de del y que en es por con para se al lo como más o pero sus le ya este esta "
    "sí porque cuando muy sin sobre también me hasta hay donde quien desde todo nos durante todos uno les ni contra "
    "otros ese eso ante ellos e esto entre son puede cada no a su está",
    "it": "il lo la i gli le un uno una di del della dei delle degli e che in è per con si al alla come più o ma non "
    "sono da dal dalla nel nella su sul anche questo questa se ha suo sua dove quando essere tutti tutto può quale "
    "loro ogni senza tra fra viene vengono l' un' dell' all' nell' a",
    "pt": "o a os as um uma de do da dos das e que em no na nos nas é por com para se ao à como mais ou mas não são "
    "pelo pela seu sua também quando muito sem sobre até há onde ele ela isso este esta ser foi pode você todos "
    "cada entre já ainda só depois mesmo às aos num numa",
    "nl": "de het een en van in is dat op te zijn met voor niet aan er om ook als dan maar bij of uit nog naar heeft "
    "ze hij wordt door over deze dit die worden kan je we tot meer geen was waar wel moet zou hebben hun onder al "
    "alleen wanneer zal tussen",
}
"""The most frequent words of grammar of each language, which make up a third to a half of its prose."""

_WORD = re.compile(r"[^\W\d_]+['’]?")
_READ = 20_000
"""Characters that are looked at; more do not change the answer."""
_PROSE = 0.12
"""Share of function words below which a text is no prose: code, tables, lists of names."""


def _weights() -> dict[str, dict[str, float]]:
    """By word, how much it counts for each language: the more languages share it, the less."""
    languages: dict[str, list[str]] = {}
    for language, words in FUNCTION_WORDS.items():
        for word in words.split():
            languages.setdefault(word, []).append(language)
    return {word: dict.fromkeys(found, 1 / len(found)) for word, found in languages.items()}


_WEIGHTS = _weights()


def identify(text: str) -> dict[str, float]:
    """Scores of the languages of :data:`FUNCTION_WORDS`, which sum to 1 at most, by the function words in ``text``.

    All are 0 for a text without words, and small for one with few function words.
    """
    words = [word.replace("’", "'").lower() for word in _WORD.findall(text[:_READ])]
    counts = dict.fromkeys(FUNCTION_WORDS, 0.0)
    hits = 0
    for word in words:
        for language, weight in _WEIGHTS.get(word, {}).items():
            counts[language] += weight
        hits += word in _WEIGHTS
    if not hits:
        return counts
    # Squares: a text has words of neighbouring languages in it, too (names, words that happen to be spelled alike).
    total = sum(count**2 for count in counts.values())
    certainty = min(1.0, hits / len(words) / _PROSE)
    return {language: certainty * count**2 / total for language, count in counts.items()}


class FunctionWordFilter(BaseFilter):
    """Keeps documents of ``languages``, by :func:`identify`. Sets ``language`` and ``language_score`` in their
    metadata, as datatrove's LanguageFilter does."""

    name = "🌍 Language by function words"

    def __init__(self, languages: Iterable[str], threshold: float, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.languages = list(languages)
        self.threshold = threshold

    def filter(self, doc: "Document") -> "bool | tuple[bool, str]":
        scores = identify(doc.text)
        language = max(scores, key=scores.__getitem__)
        doc.metadata["language"] = language
        doc.metadata["language_score"] = round(scores[language], 4)
        if scores[language] <= self.threshold:
            return False, "unknown"
        return language in self.languages or (False, language)


def language_filter(model: str, languages: list[str], threshold: float, exclusion_writer: Any = None) -> Any:
    """datatrove's LanguageFilter with the fastText model at the path ``model``; without one, function words.

    Raises :class:`ConfigError` for a language that function words do not know, or where the package fasttext is
    missing, and :class:`DataError` for a file that is no such model.
    """
    if not model:
        if unknown := [language for language in languages if language not in FUNCTION_WORDS]:
            raise ConfigError(
                f"language.keep has {', '.join(unknown)}, which function words do not tell "
                f"(they know {', '.join(FUNCTION_WORDS)})\n  {ADVICE}"
            )
        return FunctionWordFilter(languages, threshold, exclusion_writer)
    require_model_file(model)
    try:
        return _fasttext_filter(model, languages, threshold, exclusion_writer)
    except ImportError as error:
        raise ConfigError(
            f"language.model = {model} needs packages that this Python lacks: {error}\n"
            "  install them, or leave language.model out: function words tell the languages then."
        ) from None


ADVICE = (
    "fetch https://dl.fbaipublicfiles.com/fasttext/supervised-models/lid.176.bin (126 MB), put it anywhere, and give "
    "its path as language.model."
)


def require_model_file(model: str) -> None:
    if not is_there(model):
        raise DataError(f"language.model: there is no file {model}\n  {ADVICE}")
    require_regular(model)
    require_fetched(model)


class LocalModel(FT176LID):  # type: ignore[misc,unused-ignore]
    """A fastText model at a local path, loaded by each task when it is first asked."""

    def __init__(self, path: str, languages: list[str]) -> None:
        super().__init__(languages)
        self.path = path
        self._model: Any = None

    @property
    def model(self) -> Any:
        if self._model is None:
            self._model = _load_fasttext(self.path)
        return self._model


def _fasttext_filter(model: str, languages: list[str], threshold: float, exclusion_writer: Any) -> Any:
    found = LanguageFilter(languages, threshold, exclusion_writer)
    found.model = LocalModel(model, languages)
    _load_fasttext(model)  # a file that is no model is reported before anything starts
    return found


def _load_fasttext(model: str) -> Any:
    from fasttext.FastText import _FastText

    with library_errors(f"{model} is no fastText model\n  {ADVICE}"):
        return _FastText(model)
