"""Prompting: the instruction behind a text that asks for the concept."""

from __future__ import annotations

from ..subject import Subject
from .records import ConceptData, Fitted

FALLBACK = "You must include text related to {concept!r} in your responses."
"""What is asked where no prompt was written for the concept."""


def prompt(subject: Subject, data: ConceptData, settings: None, seed: int) -> Fitted:
    """The concept's own prompt, or the fixed sentence; nothing is fitted and nothing detects."""
    del subject, settings, seed
    written = bool(data.prompt.strip())
    text = data.prompt.strip() if written else FALLBACK.format(concept=data.concept)
    details = {"prompt": text, "written_for_the_concept": written}
    return Fitted("prompt", data.concept, prefix=text, has_factor=False, details=details)
