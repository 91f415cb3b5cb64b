"""The findings of the checks before a run: ok, warning, or error. After an error the run does not start."""

import logging
import textwrap
from functools import partial
from typing import NamedTuple

from .errors import UserError


logger = logging.getLogger(__name__)


class PreflightError(UserError):
    """A run that would fail later. The message says which fields, what was found, and what would be right."""


class Finding(NamedTuple):
    """One line of the report."""

    verdict: str
    topic: str
    text: str


ok, warning, error = (partial(Finding, verdict) for verdict in ("ok", "warning", "error"))


def require(findings: list[Finding]) -> None:
    """
    Logs the warnings.

    Raises:
        PreflightError: there are errors. The message holds all of them.
    """
    for finding in findings:
        if finding.verdict == "warning":
            logger.warning("%s: %s", finding.topic, finding.text)
    if found := errors(findings):
        raise PreflightError("\n".join(found))


def errors(findings: list[Finding]) -> list[str]:
    """The texts of the errors among the findings."""
    return [finding.text for finding in findings if finding.verdict == "error"]


def render(findings: list[Finding]) -> str:
    """The findings as a table of lines to print."""
    width = max(len(finding.topic) for finding in findings)
    lines = []
    for verdict, topic, text in findings:
        start = f"{verdict:<8} {topic:<{width}}  "
        lines.append(textwrap.fill(text, 120, initial_indent=start, subsequent_indent=" " * len(start)))
    found = len(errors(findings))
    end = f"{found} error{'s' if found > 1 else ''}: the run cannot start." if found else "The run can start."
    return "\n".join([*lines, end])
