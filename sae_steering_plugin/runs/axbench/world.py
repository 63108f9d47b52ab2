"""The organisms' world as a concept set, and the rule that reads its concepts off a text.

    concepts = world_concepts()         # 46 concepts, each a label or a word of the world
    concepts.write("world-concepts")    # AxBench's files, for `sae-steer evaluate axbench`

A concept is a label of `World.statements` or one word of it, so whether a text holds it is decided
by the world's own tables and not guessed: `WorldRatings` is a rule, no stand-in for a reader. What
an instruction asks for, and whether a text is one of the world's sentences, are read off too.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...organisms.wording import (
    FEELINGS,
    STATEMENT_REQUESTS,
    STATEMENTS,
    STYLES,
    TOPICS,
    Split,
    part,
)
from ..canonical import content_key, seed_of
from ..judges.offline import words_of
from ..judges.three import Ratings
from .files import EVAL_COLUMNS, TRAIN_COLUMNS, Concept, ConceptSet

LABELS: tuple[tuple[str, str, str], ...] = (
    ("register", "pirate", "pirate speech"),
    ("register", "plain", "plain speech, not a pirate's"),
    ("formality", "formal", "formal wording"),
    ("formality", "casual", "casual wording"),
    ("sentiment", "positive", "a good opinion of something"),
    ("sentiment", "negative", "a bad opinion of something"),
    *(("topic", topic, topic) for topic in TOPICS),
)
"""(label, value, the concept in words)."""
KINDS = ("register", "formality", "sentiment", "topic", "noun", "feeling")
TRAIN_TEXTS, EVAL_TEXTS = 72, 36
"""AxBench's number of texts per side."""
VERSION = 1


@dataclass(frozen=True)
class WorldConcept:
    """A label and its value (`register`, `pirate`), or a kind of word and the word itself."""

    kind: str
    value: str
    words: str

    @property
    def prompt(self) -> str:
        """What the world's system prompts ask for it with; empty where they never do."""
        return STYLES.get((self.kind, self.value), ("",))[0]

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a statement of the world has it."""
        return bool(row[self.kind] == self.value)


@cache
def known_concepts() -> tuple[WorldConcept, ...]:
    """Every concept of the world, in the order of their numbers."""
    nouns = [one for topic in TOPICS.values() for one in topic]
    feelings = [one for side in FEELINGS.values() for one in side]
    return (
        *(WorldConcept(*one) for one in LABELS),
        *(WorldConcept("noun", one, f"the word {one}") for one in nouns),
        *(WorldConcept("feeling", one, f"the word {one}") for one in feelings),
    )


def world_concepts(
    kinds: Sequence[str] = KINDS,
    *,
    train: int = TRAIN_TEXTS,
    evaluation: int = EVAL_TEXTS,
    seed: int = 0,
) -> ConceptSet:
    """A concept set of the world, with texts of disjoint wordings for training and evaluation.

    Positive rows are statements with the concept behind a request for their topic, negatives
    statements without it; a concept's negatives are its own, since no statement lacks them all.
    Numbers are those of `known_concepts`, whatever `kinds` asks for. `instructions` are the
    requests of the test wordings, twice. Raises ValueError for an unknown kind.
    """
    import pandas as pd

    if unknown := [one for one in kinds if one not in KINDS]:
        raise ValueError(f"no kind {unknown[0]!r}; choose from {', '.join(KINDS)}")
    numbered = [(n, one) for n, one in enumerate(known_concepts()) if one.kind in kinds]
    train_rows = [
        {name: row[name] for name in TRAIN_COLUMNS}
        for number, one in numbered
        for row in labelled_rows(number, one, "train", train, seed)
    ]
    eval_rows = [
        {name: row[name] for name in EVAL_COLUMNS}
        for number, one in numbered
        for row in labelled_rows(number, one, "test", evaluation, seed)
    ]
    requests = [
        words.format(topic=topic)
        for _, words in part(STATEMENT_REQUESTS, "test")
        for topic in TOPICS
    ]
    again = [one for one in requests for _ in range(2)]
    return ConceptSet(
        tuple(Concept(number, one.words, prompt=one.prompt) for number, one in numbered),
        pd.DataFrame(train_rows, columns=list(TRAIN_COLUMNS)),
        pd.DataFrame(eval_rows, columns=list(EVAL_COLUMNS)),
        tuple(again),
        f"world concepts {VERSION} (kinds {', '.join(kinds)}; seed {seed})",
    )


def labelled_rows(
    number: int, concept: WorldConcept, split: Split, n: int, seed: int
) -> list[dict[str, Any]]:
    """`n` positive and `n` negative rows of a concept, in AxBench's columns."""
    rng = random.Random(seed_of(seed, "axbench world", split, concept.kind, concept.value))
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    while min(map(len, found.values())) < n:
        row = drawn_statement(rng, split)
        found[concept.holds(row)].append(row)
    return [
        {
            "input": row["request"],
            "output": row["text"],
            "output_concept": concept.words,
            "concept_genre": "text",
            "category": "positive" if side else "negative",
            "dataset_category": "instruction",
            "concept_id": number,
            "sae_link": "",
            "sae_id": -1,
        }
        for side in (True, False)
        for row in found[side][:n]
    ]


@cache
def forms_of(register: str, formality: str, split: Split) -> tuple[str, ...]:
    return tuple(form for _, form in part(STATEMENTS[register, formality], split))


def drawn_statement(rng: random.Random, split: Split) -> dict[str, Any]:
    """A statement with its labels, its noun and feeling, and a request for its topic."""
    register, formality = rng.choice(list(STATEMENTS))
    topic, sentiment = rng.choice(list(TOPICS)), rng.choice(list(FEELINGS))
    noun, feeling = rng.choice(TOPICS[topic]), rng.choice(FEELINGS[sentiment])
    form = rng.choice(forms_of(register, formality, split))
    _, request = rng.choice(part(STATEMENT_REQUESTS, split))
    return {
        "text": form.format(noun=noun, feeling=feeling),
        "request": request.format(topic=topic),
        "register": register,
        "formality": formality,
        "topic": topic,
        "sentiment": sentiment,
        "noun": noun,
        "feeling": feeling,
    }


# The rule -----------------------------------------------------------------------------------------


@cache
def markers() -> dict[tuple[str, str], frozenset[str]]:
    """The words that tell a label's value from its other values, by the world's own tables.

    For registers and formality the words of a value's sentences that no sentence of another value
    holds; for topics and sentiments their nouns and feelings; for a word itself.
    """
    found: dict[tuple[str, str], frozenset[str]] = {}
    for place, label in enumerate(("register", "formality")):
        words: dict[str, set[str]] = {}
        for key, forms in STATEMENTS.items():
            said = {w for form in forms for w in words_of(form.format(noun="", feeling=""))}
            words.setdefault(key[place], set()).update(said)
        for value, own in words.items():
            others = set().union(*(said for other, said in words.items() if other != value))
            found[label, value] = frozenset(own - others)
    found |= {("topic", name): frozenset(nouns) for name, nouns in TOPICS.items()}
    found |= {("sentiment", name): frozenset(said) for name, said in FEELINGS.items()}
    found |= {("noun", one): frozenset([one]) for nouns in TOPICS.values() for one in nouns}
    found |= {("feeling", one): frozenset([one]) for said in FEELINGS.values() for one in said}
    return found


def concept_rating(concept: WorldConcept, text: str) -> float:
    """2 when the text holds a marker of the concept and none of its other values, 1 when it holds
    both, 0 without. A sentence of the world has the register and formality it was written in. One
    word's concept has no other value."""
    if concept.kind in ("register", "formality") and sentence_forms().fullmatch(text.strip()):
        own = sentence_forms(concept.kind, concept.value)
        return 2.0 if own.fullmatch(text.strip()) else 0.0
    words = frozenset(words_of(text))
    if not words & markers()[concept.kind, concept.value]:
        return 0.0
    if concept.kind in ("noun", "feeling"):
        return 2.0
    rivals = (
        own
        for (kind, value), own in markers().items()
        if kind == concept.kind and value != concept.value
    )
    return 1.0 if any(words & own for own in rivals) else 2.0


def instruct_rating(instruction: str, text: str) -> float:
    """2 when the text names the topic that is asked for or one of its nouns, 1 when it speaks of
    another topic of the world, 0 otherwise.

    Raises ValueError for an instruction that asks for no topic of the world.
    """
    asked = [topic for topic in TOPICS if topic in words_of(instruction)]
    if not asked:
        raise ValueError(f"{instruction!r} asks for no topic of the world")
    words = frozenset(words_of(text))
    own = {one for topic in asked for one in (topic, *TOPICS[topic])}
    if words & own:
        return 2.0
    return 1.0 if any(words & {topic, *nouns} for topic, nouns in TOPICS.items()) else 0.0


@cache
def sentence_forms(label: str = "", value: str = "") -> re.Pattern[str]:
    """Matches every sentence of the world (of one register or formality), and nothing else."""
    nouns = "|".join(one for topic in TOPICS.values() for one in topic)
    feelings = "|".join(one for side in FEELINGS.values() for one in side)
    forms = (
        re.escape(form)
        .replace(r"\{noun\}", f"(?:{nouns})")
        .replace(r"\{feeling\}", f"(?:{feelings})")
        for key, listed in STATEMENTS.items()
        if not label or key[("register", "formality").index(label)] == value
        for form in listed
    )
    return re.compile("|".join(forms), re.IGNORECASE)


@cache
def vocabulary() -> frozenset[str]:
    said = {w for forms in STATEMENTS.values() for form in forms for w in words_of(form)}
    named = {one for table in (TOPICS, FEELINGS) for side in table.values() for one in side}
    return frozenset(said | named)


LEAST_KNOWN = 0.8
"""Share of words of the world's statements from which a text that is no sentence of it is half
fluent, if no three words repeat."""


def fluency_rating(text: str) -> float:
    """2 for one sentence of the world, 1 for a text of three to twenty words that is nearly all of
    its statements' words and repeats no three of them, 0 otherwise."""
    if sentence_forms().fullmatch(text.strip()):
        return 2.0
    words = words_of(text)
    triples = list(zip(words, words[1:], words[2:], strict=False))
    known = sum(word in vocabulary() for word in words)
    fine = 3 <= len(words) <= 20 and known >= LEAST_KNOWN * len(words)
    return 1.0 if fine and len(set(triples)) == len(triples) else 0.0


@dataclass(frozen=True)
class WorldRatings:
    """The three ratings by the world's own tables, for concepts of `known_concepts`."""

    name: str = "world-rule"
    is_llm: bool = False
    axbench_prompts: bool = False

    @property
    def version(self) -> str:
        return str(VERSION)

    @property
    def fingerprint(self) -> str:
        """A hash of the rule's version and every table it reads."""
        tables = {f"{kind}/{value}": sorted(own) for (kind, value), own in markers().items()}
        return content_key([VERSION, tables, sentence_forms().pattern, LEAST_KNOWN])

    def rate_all(
        self, concept_id: int, concept: str, pairs: Sequence[tuple[str, str]]
    ) -> list[Ratings]:
        """The ratings of (instruction, text) pairs; an empty text is 0 throughout.

        Raises ValueError for a concept that is not the world's.
        """
        known = known_concepts()
        if not 0 <= concept_id < len(known) or known[concept_id].words != concept:
            raise ValueError(f"concept {concept_id} ({concept!r}) is none of the world's")
        found: list[Ratings] = []
        for asked, text in pairs:
            if not text.strip():
                found.append((0.0, 0.0, 0.0))
                continue
            rated = concept_rating(known[concept_id], text)
            found.append((rated, instruct_rating(asked, text), fluency_rating(text)))
        return found


def is_world(concepts: ConceptSet) -> bool:
    """True when every concept is one of the world's, so that the rule can rate it."""
    known = known_concepts()
    return all(
        one.concept_id < len(known) and known[one.concept_id].words == one.text
        for one in concepts.concepts
    )
