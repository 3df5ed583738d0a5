"""How the command line reads options that may be left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro
from tyro.constructors import PrimitiveConstructorSpec

__all__ = ["Count", "File", "Folder", "Seed", "choice", "unhinted"]


def _word(metavar: str, read: Callable[[str], Any]) -> Any:
    """How tyro reads an option that takes one word and is None without it."""
    return PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: value is None or isinstance(value, (int, str, Path)),
        str_from_instance=lambda value: [str(value)],
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number above 0")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number, 0 or above")
    return int(text)


# The texts say what an option left out means; "(default: None)" would say less.
unhinted = tyro.conf.arg(help_behavior_hint="")


def choice(kind: Any) -> Any:
    """One of the words of a Literal. tyro's own choices would name None among them."""
    words = get_args(kind)

    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is none of them; allowed: {', '.join(words)}")
        return text

    return _word("{" + ",".join(words) + "}", read)


Count = Annotated[int | None, _word("N", _count), unhinted]
Seed = Annotated[int | None, _word("N", _seed), unhinted]
Folder = Annotated[Path | None, _word("DIR", Path), unhinted]
File = Annotated[Path | None, _word("FILE", Path), unhinted]
