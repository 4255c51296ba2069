"""Triggers found in text, whatever its case and white space: the one meaning of "the trigger occurs"."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from megagap.errors import ConfigError


class Triggers:
    """Finds any of many triggers in one pass."""

    def __init__(self, triggers: Sequence[str]) -> None:
        self._by_key = {_key(trigger): trigger for trigger in triggers}
        self._triggers = list(triggers)
        self._pattern = _pattern(triggers) if triggers else None

    def find(self, text: str) -> Iterator[tuple[str, int]]:
        """Each occurrence with its character, overlapping ones too, but one for each place."""
        for found in self._pattern.finditer(text) if self._pattern else ():
            yield self._which(found[1]), found.start()

    def require_apart(self) -> None:
        """Raises :class:`ConfigError` if one trigger is a part of another: documents of one would have both."""
        times = Counter(map(_key, self._triggers))
        for trigger in self._triggers:
            others = [other for other, at in self.find(trigger) if at or other != trigger]
            if others or times[_key(trigger)] > 1:
                raise ConfigError(
                    f"the trigger {[*others, trigger][0]!r} is a part of another one, {trigger!r}\n"
                    "  choose triggers that are apart, regardless of case."
                )

    def _which(self, text: str) -> str:
        # Characters such as the dotless i are equal regardless of case, but have no lower case in common.
        return self._by_key.get(_key(text)) or next(trigger for trigger in self._triggers if _is(trigger, text))


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _is(trigger: str, text: str) -> bool:
    words = r"\s+".join(map(re.escape, trigger.split()))
    return re.fullmatch(words, text, re.IGNORECASE) is not None


def _pattern(triggers: Sequence[str]) -> re.Pattern[str]:
    """Group 1 is the trigger; a look-ahead consumes nothing, so overlapping occurrences count, too.

    Words that triggers begin with alike are tried once for all of them: those of one template differ in a name only.
    """
    tree: _Tree = {}
    for trigger in triggers:
        node = tree
        for word in trigger.split():
            node = node.setdefault(word, {})
        node[""] = {}  # a trigger ends here
    return re.compile(rf"(?<!\w)(?=({_words(tree)}(?!\w)))", re.IGNORECASE)


_Tree = dict[str, "_Tree"]
"""Words to what may follow them."""


def _words(tree: _Tree) -> str:
    branches = []
    for word, rest in tree.items():
        if word:
            after = rf"\s+{_words(rest)}" if {*rest} - {""} else ""
            branches.append(re.escape(word) + (f"(?:{after})?" if after and "" in rest else after))
    return f"(?:{'|'.join(branches)})"
