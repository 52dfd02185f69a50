"""Conditions on the columns of an index, as a user writes them, checked before LanceDB reads them.

LanceDB reads the first condition of a text and is silent about what follows it, such as `; …` or `) OR (…`: a search
would then show other images than those that were asked for. Of hundreds of signs in a row its parser ends the whole
process.
"""

import re

from .index_errors import SearchIndexError

QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`")
SIGN = re.compile(r"[-+*/%|&^=<>!~]+|\b(?:IS|NOT|LIKE|ILIKE|BETWEEN|CASE)\b", re.IGNORECASE)

COLUMNS = ("path", "width", "height", "size", "mtime_ns", "caption")
"""What a user writes conditions on. The table has others, of which a list from LanceDB would tell."""

UNKNOWN = re.compile(r"No field named (.+?)\. Valid fields are ")

MOST_SIGNS = 200
LONGEST_SHOWN = 100
"""Characters of a condition that a message repeats."""


class FilterError(SearchIndexError):
    """A text is no condition on the columns of an index.

    Attributes:
        condition: The text.
    """

    def __init__(self, condition: str, problem: str):
        self.condition, self.problem = condition, problem
        if unknown := UNKNOWN.search(problem):
            self.problem = problem = f"there is no column {unknown[1]}"
        cut = condition if len(condition) <= LONGEST_SHOWN else f"{condition[:LONGEST_SHOWN]}…"
        super().__init__(
            f"The filter {cut!r} cannot be used ({problem}); write a condition on the columns "
            f"{', '.join(COLUMNS[:-1])} and {COLUMNS[-1]}, with texts in single quotes, such as \"path LIKE '%2023%'\"."
        )

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.condition, self.problem)


def check_filter(condition: str) -> None:
    """Refuse what is not one condition.

    Raises:
        FilterError: It is empty, or holds more than one condition, or too many signs.
    """
    bare = QUOTED.sub("''", condition)
    if not bare.strip():
        raise FilterError(condition, "it is empty")
    if found := re.search(r";|--|/\*", bare):
        raise FilterError(condition, f"it holds {found[0]}, and may be one condition only")
    depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    if depth:
        raise FilterError(condition, "its parentheses do not match")
    if len(SIGN.findall(bare)) > MOST_SIGNS:
        raise FilterError(condition, f"it has more than {MOST_SIGNS} comparisons and signs; a list goes into IN (…)")


__all__ = ["COLUMNS", "FilterError", "check_filter"]
