"""Readable text from HTML pages and roff manual pages: one paragraph per line, preformatted parts as they are."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser

# ------------------------------------------------------------------------------------------------------------- HTML

_HIDDEN_TAGS = {"head", "script", "style", "nav", "form", "footer", "svg"}
_NAVIGATION = {
    "banner", "contents", "docnav", "footer", "headerlink", "highlighting-active-link", "highlighting-settings",
    "languages", "menu", "menu-wrapper", "mobile-nav", "nav_table", "navfooter", "navheader", "related",
    "sphinxsidebar", "summary-letter", "toc", "tocframe",
}  # fmt: skip
"""Classes and ids of what is not the page's own text, in the HTML of Sphinx, DocBook, Publican and Texinfo."""

_PARAGRAPHS = {
    "article", "blockquote", "body", "div", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "main", "ol", "p", "pre",
    "section", "table", "ul",
}  # fmt: skip
_LINES = {"br", "dd", "dt", "li", "tr"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class _TextOfPage(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._words: list[str] = []
        self._preformatted = 0
        self._hidden_tag = ""
        self._hidden_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden_depth:
            self._hidden_depth += tag == self._hidden_tag
            return
        names = {name for key, value in attrs if key in ("class", "id") and value for name in value.split()}
        if tag not in _VOID and (tag in _HIDDEN_TAGS or names & _NAVIGATION):
            self._hidden_tag, self._hidden_depth = tag, 1
            return
        self._boundary(tag)
        self._preformatted += tag == "pre"
        if tag == "li":
            self._words.append("- ")
        elif tag in ("td", "th"):
            self._words.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._hidden_depth:
            self._boundary(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden_depth:
            self._hidden_depth -= tag == self._hidden_tag
            return
        self._boundary(tag)
        self._preformatted -= tag == "pre" and self._preformatted > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden_depth:
            self._words.append(data)

    def _boundary(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self.flush("\n\n")
        elif tag in _LINES:
            self.flush("\n")

    def flush(self, end: str) -> None:
        text = "".join(self._words)
        self._words.clear()
        text = text.strip("\n").rstrip() if self._preformatted else " ".join(text.split())
        if text and text != "-":
            self.parts.append(text + end)
        elif end == "\n\n" and self.parts:
            self.parts[-1] = self.parts[-1].rstrip("\n") + end


def html_to_text(page: str) -> str:
    """The text of an HTML page without its navigation."""
    parser = _TextOfPage()
    parser.feed(page)
    parser.close()
    parser.flush("\n\n")
    return "".join(parser.parts).strip()


# ------------------------------------------------------------------------------------------------------------- roff

_SPECIAL = {
    "-": "-", "aq": "'", "bu": "•", "co": "©", "cq": "’", "dq": '"', "em": "—", "en": "–", "ga": "`", "ha": "^",
    "hy": "-", "lq": "“", "oq": "‘", "rq": "”", "rs": "\\", "ti": "~", "mu": "×", "+-": "±", "<=": "≤", ">=": "≥",
    "!=": "≠", "==": "≡", "->": "→", "<-": "←", "aa": "´", "rg": "®", "tm": "™", "de": "°", "sc": "§", "Fo": "«",
    "Fc": "»", "la": "⟨", "ra": "⟩", "ul": "_", "at": "@", "sh": "#", "Do": "$", "mi": "-", "pl": "+", "eq": "=",
    "bv": "|", "ba": "|", "or": "|", "R": "®", "Tm": "™", "S": "", "if": "∞", "*m": "μ", "mc": "µ", "r!": "¡",
    "12": "½", "14": "¼", "34": "¾", "tS": "", "sq": "□", "dg": "†", "HF": "", "CQ": "”", "OQ": "“",
}  # fmt: skip

_ESCAPE = re.compile(
    r"""\\(?:
        "(?P<comment>.*)
      | [fF](?:\[[^]]*\]|\(..|.)                    # fonts
      | s(?:\[[^]]*\]|'[^']*'|[-+]?\(?\d{1,2}|[-+]\d)  # sizes
      | [mM](?:\[[^]]*\]|\(..|.)                    # colours
      | \*(?P<string>\[[^]]*\]|\(..|.)
      | n[+-]?(?:\[[^]]*\]|\(..|.)                  # number registers
      | [hvwbdDXxlLoRSHY]'[^']*'                    # motions, drawings, devices
      | N'(?P<code>\d+)'
      | \[(?P<long>[^]]*)\]
      | \((?P<short>..)
      | (?P<other>.)
    )""",
    re.VERBOSE,
)
_PLAIN = {" ": " ", "~": " ", "0": " ", "-": "-", "e": "\\", "\\": "\\", "'": "´", "`": "`", ".": ".", "t": "\t"}
_FONT_MACROS = {"B", "I", "SM", "SB", "BI", "BR", "IB", "IR", "RB", "RI"}
_PARAGRAPH_MACROS = {"PP", "P", "LP", "RS", "RE", "HP", "TP", "TQ", "IP", "sp", "Sp"}
_NO_FILL = {"nf", "EX", "Vb", "DS"}
_FILL = {"fi", "EE", "Ve", "DE"}


def roff_to_text(source: str) -> str:
    """The text of a manual page written with the ``man`` macros; empty for a page that only points to another one.

    Tables become lines of cells. Pages with the ``mdoc`` macros, a rarity on Linux, give an empty text.
    """
    if re.search(r"^\.(so|Dd)\b", source, re.MULTILINE):
        return ""
    page = _Page()
    lines = iter(re.sub(r"\\\n", "", source).splitlines())
    for line in lines:
        page.add(line, lines)
    page.flush()
    return re.sub(r"\n{3,}", "\n\n", "".join(page.parts)).strip()


class _Page:
    def __init__(self) -> None:
        self.parts: list[str] = []
        self._words: list[str] = []
        self._fill = True

    def add(self, line: str, rest: Iterator[str]) -> None:
        if not line.startswith((".", "'")):
            self._text(_unescape(line))
            return
        match = re.match(r"[.']\s*([A-Za-z]\S*)\s*(.*)", line)
        if match is None:  # a comment, or an empty request
            return
        macro, arguments = match[1], _arguments(match[2])
        if macro == "TH":
            self._block(f"{arguments[0]}({arguments[1]})" if len(arguments) > 1 else "".join(arguments))
        elif macro in ("SH", "SS"):
            self._fill = True
            self._block(" ".join(arguments))
        elif macro in _FONT_MACROS:
            self._text(("" if len(macro) == 2 and macro not in ("SM", "SB") else " ").join(arguments))
        elif macro in _PARAGRAPH_MACROS:
            self.flush()
            if macro == "IP" and arguments:
                self._text(arguments[0])
        elif macro in _NO_FILL | _FILL:
            self.flush()
            self._fill = macro in _FILL
        elif macro == "br":
            self._break()
        elif macro in ("UR", "MT"):
            self._text(f"<{''.join(arguments[:1])}>")
        elif macro == "TS":
            self._table(rest)
        elif macro in ("de", "de1", "am", "ig"):
            for skipped in rest:
                if skipped.startswith(".."):
                    break
        elif macro in ("if", "ie", "el"):
            _skip_braces(line, rest)

    def _text(self, text: str) -> None:
        if not self._fill:
            self.parts.append(text.rstrip() + "\n")
        elif text.strip():
            self._words.append(text.strip())
        else:
            self.flush()

    def _block(self, text: str) -> None:
        self.flush()
        self.parts.append(text + "\n\n")

    def _break(self) -> None:
        if self._words:
            self.parts.append(" ".join(self._words) + "\n")
            self._words.clear()

    def flush(self) -> None:
        if self._words:
            self.parts.append(" ".join(self._words))
            self._words.clear()
        self.parts.append("\n\n")

    def _table(self, rest: Iterator[str]) -> None:
        """Cells of tbl(1), one row per line; layout is dropped."""
        self.flush()
        separator, in_format = "\t", True
        block: list[str] | None = None
        for line in rest:
            if line.startswith(".TE"):
                break
            if in_format:
                if option := re.search(r"tab\s*\((.)\)", line):
                    separator = option[1]
                in_format = not line.rstrip().endswith(".")
                continue
            if line.startswith(".T&"):
                in_format = True
            elif block is not None:
                if line.startswith("T}"):
                    self.parts.append(" ".join(block) + line[2:].replace(separator, "  ") + "\n")
                    block = None
                elif not line.startswith((".", "'")):
                    block.append(_unescape(line))
                elif (match := re.match(r"[.'](\w+)\s*(.*)", line)) and match[1] in _FONT_MACROS:
                    block.append("".join(_arguments(match[2])))
            elif not line.startswith((".", "'")) and line.strip() not in ("_", "="):
                cells = [_unescape(cell).strip() for cell in line.split(separator)]
                if cells[-1] == "T{":
                    block = [cell for cell in cells[:-1] if cell]
                else:
                    self.parts.append("  ".join(cell for cell in cells if cell) + "\n")
        self.flush()


def _skip_braces(line: str, rest: Iterator[str]) -> None:
    """A conditional request: what it guards is layout in the pages that are read here."""
    depth = line.count(r"\{") - line.count(r"\}")
    while depth > 0 and (following := next(rest, None)) is not None:
        depth += following.count(r"\{") - following.count(r"\}")


def _arguments(text: str) -> list[str]:
    """A macro's arguments; quotes hold several words together, and a doubled quote stands for one."""
    text = re.sub(r'(?<!\\)\\".*', "", text)
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s\\])+)', text)
    return [_unescape(quoted.replace('""', '"') or bare) for quoted, bare in found]


def _unescape(text: str) -> str:
    return _ESCAPE.sub(_character, text) if "\\" in text else text


def _character(match: re.Match[str]) -> str:
    name = match["long"] or match["short"]
    if name:
        if re.fullmatch(r"u[0-9A-F]{4,6}", name):
            return chr(int(name[1:], 16))
        # An accent and its letter, such as \[e aa] or \('e, are rare in pages that are in UTF-8 today.
        return _SPECIAL.get(name, "")
    if match["string"]:
        return _SPECIAL.get(match["string"].strip("[]("), "")
    if match["code"]:
        return chr(int(match["code"]))
    return _PLAIN.get(match["other"] or "", "")
