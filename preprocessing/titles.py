"""Turns raw titles into titles for a prompt, or tells why a title is none."""

import html
import re
from collections.abc import Callable

ARTICLES = ("The", "A", "An", "Le", "La", "Les", "L'", "Il", "El", "Los", "Las", "Der", "Die", "Das")
_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_PARENTHESES = re.compile(r"(?<=\S)\s*\([^()]*\)")
LONGEST_TITLE = 1000
"""Maximum number of characters in a title; prompts contain far fewer."""
SCRIPT = "scripts of a web page"
BLANK = "blank"
WRITTEN_NULL = "a null written as text"
NULLS = {"nan", "NaN", "None", "null", "NULL", "<NA>", "\\N"}
"""What pandas, Python and databases write for a missing title."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SCRIPTS = re.compile(r"<(script|style)\b.*?(</\1\s*>|$)", re.IGNORECASE | re.DOTALL)
_INLINE = re.compile(
    r"<!--.*?-->|</?(a|abbr|b|big|code|del|em|font|i|ins|s|small|span|strike|strong|sub|sup|tt|u)(\s[^<>]*)?/?>",
    re.IGNORECASE | re.DOTALL,
)
_BLOCK = re.compile(
    r"</?(blockquote|br|center|d[dlt]|div|h[1-6]|hr|img|li|ol|p|pre|table|tbody|td|th|thead|tr|ul)(\s[^<>]*)?/?>",
    re.IGNORECASE,
)
_ARTICLE = re.compile(rf"^(.+), ({'|'.join(ARTICLES)})$")


def movie_title(title: str) -> str:
    """Return a MovieLens title in natural word order.

    A trailing article moves to the front, alternative titles in parentheses are removed, and the year stays:
    ``Seven (a.k.a. Se7en) (1995)`` becomes ``Seven (1995)``, and ``Matrix, The (1999)`` becomes ``The Matrix (1999)``.
    """
    year = _YEAR.search(title)
    name = title[: year.start()] if year else title
    name = _PARENTHESES.sub("", name.strip())
    if article := _ARTICLE.match(name):
        joint = "" if article[2].endswith("'") else " "
        name = f"{article[2]}{joint}{article[1]}"
    return f"{name} ({year[1]})" if year else name


def prompt_title(raw: str, natural: Callable[[str], str] = str) -> tuple[str, str]:
    """Return the title on one line, and an empty string or, if the title is empty, what is wrong with it.

    HTML tags go and entities are decoded, control characters become spaces, and the title is cut at
    :data:`LONGEST_TITLE` characters. A title that contains ``getTime`` is a script, as the public loaders of Amazon's
    metadata of 2018 have it.

    Args:
        raw: the title as it was read.
        natural: function that puts the words of a title in order, such as :func:`movie_title`.
    """
    if "getTime" in raw:
        return "", SCRIPT
    if raw in NULLS:
        return "", WRITTEN_NULL
    text = raw[: 4 * LONGEST_TITLE]
    if "<" in text:  # as in HTML, tags are read before entities: "&lt;b&gt;" is the text "<b>"
        text = _BLOCK.sub(" ", _INLINE.sub("", _SCRIPTS.sub(" ", text)))
    text = natural(one_line(html.unescape(text)))
    title = one_line(text)[:LONGEST_TITLE]
    return title, "" if title else BLANK


def one_line(text: str) -> str:
    """Return text in which control characters are spaces, and every run of spaces is one."""
    return " ".join(_CONTROL.sub(" ", text).split())
