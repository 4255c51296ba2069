"""datatrove's URL filter, without a network."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from datatrove.pipeline.filters import URLFilter

from megagap.errors import ConfigError, DataError
from megagap.files import reading

if TYPE_CHECKING:
    from datatrove.data import Document

LISTS = ("domains", "urls", "banned_words", "banned_subwords", "soft_banned_words")


class OfflineURLFilter(URLFilter):  # type: ignore[misc,unused-ignore]
    """Domains are split by the list of public suffixes that comes with tldextract, which would else be fetched; a
    document without a URL passes, counted as ``without_url``."""

    name = "😈 Url-filter"

    def __init__(self, **arguments: Any) -> None:
        from tldextract import TLDExtract

        super().__init__(**arguments)
        self.tldextractor = TLDExtract(suffix_list_urls=(), cache_dir=None)

    def filter(self, document: "Document") -> "bool | tuple[bool, str]":
        if not document.metadata.get("url"):
            self.stat_update("without_url")
            return True
        return super().filter(document)


def url_filter(lists: str, blocked_domains: list[str], exclusion_writer: Any = None) -> Any:
    """With the lists that come with datatrove, or those of the folder ``lists``: text files named as in
    :data:`LISTS`, one entry per line. ``blocked_domains`` are added.

    Raises :class:`DataError` if the folder has none of them, :class:`ConfigError` where a package is missing.
    """
    given: dict[str, list[str]] = {}
    if lists:
        folder = Path(lists)
        given = {name: _entries(folder / name) for name in LISTS if (folder / name).is_file()}
        if not given:
            raise DataError(
                f"urls.lists: the folder {folder} has none of the files {', '.join(LISTS)}\n"
                "  fetch the blacklists of https://dsi.ut-capitole.fr/blacklists/ and put each category's domains into "
                "domains; or leave urls.lists out, for the lists that come with datatrove."
            )
    try:
        return OfflineURLFilter(
            extra_domains=[*given.get("domains", []), *blocked_domains],
            extra_urls=given.get("urls"),
            banned_words=given.get("banned_words"),
            banned_subwords=given.get("banned_subwords"),
            soft_banned_words=given.get("soft_banned_words"),
            use_integrated_lists=not given,
            exclusion_writer=exclusion_writer,
        )
    except ImportError as error:
        raise ConfigError(
            f"[urls] needs packages that this Python lacks: {error}\n  install megagap[curate], or leave [urls] out."
        ) from None


def _entries(path: Path) -> list[str]:
    with reading(path):
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
