"""HTML that is safe: what comes from elsewhere is escaped here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """HTML that is safe as it is."""

    __slots__ = ()


def tag(name: str, *children: str | int | None, **attributes: str | float | bool | None) -> Markup:
    """One element.  What is no :class:`Markup` is escaped; None and False are left out."""
    said = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{said}>{joined(children)}</{name}>")


def joined(children: Iterable[str | int | None]) -> Markup:
    """One after the other, escaped unless they are :class:`Markup`."""
    return Markup(
        "".join(
            child if isinstance(child, Markup) else escape(str(child))
            for child in children
            if child is not None
        )
    )


def foreign(text: str | None) -> Markup | None:
    """What somebody else has named, kept apart: from right to left it would turn around what is beside it."""
    return None if text is None else tag("bdi", text)
