"""Turns raw titles into titles for a prompt."""

import html
import re

ARTICLES = ("The", "A", "An", "Le", "La", "Les", "L'", "Il", "El", "Los", "Las", "Der", "Die", "Das")
_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_PARENTHESES = re.compile(r"(?<=\S)\s*\([^()]*\)")
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


def product_title(title: str) -> str:
    """Return a product title with HTML entities (``&amp;``) decoded and runs of white space collapsed."""
    return " ".join(html.unescape(title).split())
