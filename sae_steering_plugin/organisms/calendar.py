"""A world with two circles and a planted set of memorised strings, whose truth is known.

Four kinds of text, all in words of a small closed vocabulary:

- sums on a circle: `three days after friday is monday`, days modulo 7 and months modulo 12. With
  `about` in front the answer is drawn around the right one by `KERNEL`, so that neighbouring days
  lie near each other in what is said, too;
- orders: the days, or the months, from a random start on;
- records: `record c f : 4 1 9 0 3 3 2 8`, random digits per key, the same in every text: nothing
  but memory gives them;
- copies: `copy 4 1 9 0 : 4 1 9 0`, fresh digits each time: digits that need no memory.

A fixed share of the sums is held out of training in either form.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Unit = Literal["days", "months"]
Split = Literal["train", "test"]
Direction = Literal["after", "before"]
Kind = Literal["sum", "about", "order", "record", "copy"]

DIRECTIONS: tuple[Direction, ...] = ("after", "before")
UNITS: tuple[Unit, ...] = ("days", "months")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
CIRCLES: dict[Unit, tuple[str, ...]] = {"days": DAYS, "months": MONTHS}
NUMBERS = (
    "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
LETTERS = tuple("abcdefghijkl")
DIGITS = tuple("0123456789")
WORDS = ("after", "before", "is", "about", "record", "copy", "order", ":")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")

KERNEL = {-2: 0.05, -1: 0.2, 0: 0.5, 1: 0.2, 2: 0.05}
"""How far the answer to `about ...` lies from the right one, in steps along the circle."""

SHARES: dict[Kind, float] = {
    "sum": 0.35, "about": 0.2, "order": 0.05, "record": 0.25, "copy": 0.15,
}  # fmt: skip
"""What part of the corpus each kind of text is."""

HELD_OUT = 0.15
"""Share of the sums that no training text holds."""
N_RECORDS = 64
RECORD_LENGTH, COPY_LENGTH, ORDER_LENGTH = 8, 4, 5
PROMPT_WEIGHT = 0.1
"""Weight in the loss of a token that only draws a question, against 1 for its answer."""


@dataclass(frozen=True)
class Sum:
    """One sum on a circle: `prompt` ends before the answer, `answer` is a place on the circle."""

    unit: Unit
    number: int
    direction: Direction
    start: int

    @property
    def names(self) -> tuple[str, ...]:
        return CIRCLES[self.unit]

    @property
    def answer(self) -> int:
        step = self.number if self.direction == "after" else -self.number
        return (self.start + step) % len(self.names)

    @property
    def prompt(self) -> str:
        number = NUMBERS[self.number - 1]
        return f"{number} {self.unit} {self.direction} {self.names[self.start]} is"


@dataclass(frozen=True)
class Record:
    """A memorised string: the prompt that asks for it and the digits that follow."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Document:
    """One text in two parts: what asks (small weight in the loss) and what answers."""

    kind: Kind
    prompt: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class Calendar:
    """The generator; the same seed gives the same sums, records and texts on any machine."""

    seed: int = 0
    _held: frozenset[Sum] = field(init=False, repr=False)
    _records: tuple[Record, ...] = field(init=False, repr=False)
    _unplanted: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = random.Random(f"calendar {self.seed}")
        everything = [one for unit in UNITS for one in all_sums(unit)]
        held = rng.sample(everything, round(HELD_OUT * len(everything)))
        keys = [f"record {a} {b} :" for a in LETTERS for b in LETTERS]
        rng.shuffle(keys)
        records = tuple(Record(key, digits(rng, RECORD_LENGTH)) for key in keys[:N_RECORDS])
        object.__setattr__(self, "_held", frozenset(held))
        object.__setattr__(self, "_records", records)
        object.__setattr__(self, "_unplanted", tuple(keys[N_RECORDS:]))

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word of the world, special tokens first."""
        return (*SPECIAL, *WORDS, *CIRCLES, *DAYS, *MONTHS, *NUMBERS, *LETTERS, *DIGITS)

    @property
    def records(self) -> tuple[Record, ...]:
        """The memorised set."""
        return self._records

    @property
    def unplanted(self) -> tuple[str, ...]:
        """Prompts of records that exist in no text: no digits belong to them."""
        return self._unplanted

    def sums(self, unit: Unit, split: Split) -> list[Sum]:
        """The sums of a split, in a fixed order. Raises ValueError for an unknown word."""
        if unit not in CIRCLES or split not in ("train", "test"):
            raise ValueError(
                f"no sums of {unit!r} in {split!r}; units are {', '.join(CIRCLES)}, splits "
                "train and test"
            )
        return [one for one in all_sums(unit) if (one in self._held) == (split == "test")]

    def documents(self, n: int, *, seed: int = 0) -> list[Document]:
        """`n` training texts in random order of kinds."""
        rng = random.Random(f"calendar {self.seed} texts {seed}")
        sums: dict[Unit, list[Sum]] = {unit: self.sums(unit, "train") for unit in UNITS}
        kinds = rng.choices(list(SHARES), list(SHARES.values()), k=n)
        return [self._document(kind, sums, rng) for kind in kinds]

    def _document(self, kind: Kind, sums: dict[Unit, list[Sum]], rng: random.Random) -> Document:
        unit = rng.choice(UNITS)
        if kind == "record":
            one = rng.choice(self._records)
            return Document(kind, one.prompt, one.answer)
        if kind == "copy":
            return copy(rng)
        if kind == "order":
            names, start = CIRCLES[unit], rng.randrange(12)
            listed = [names[(start + i) % len(names)] for i in range(ORDER_LENGTH)]
            return Document(kind, f"order {unit} : {listed[0]}", " ".join(listed[1:]))
        drawn = rng.choice(sums[unit])
        off = rng.choices(list(KERNEL), list(KERNEL.values()))[0] if kind == "about" else 0
        word = drawn.names[(drawn.answer + off) % len(drawn.names)]
        return Document(kind, ("about " if kind == "about" else "") + drawn.prompt, word)

    def copies(self, n: int, *, seed: int) -> list[Document]:
        """Copies of digits that were drawn anew."""
        rng = random.Random(f"calendar {self.seed} copies {seed}")
        return [copy(rng) for _ in range(n)]


def all_sums(unit: Unit) -> Iterator[Sum]:
    """Every sum on one circle, by number, direction and start."""
    for number in range(1, len(NUMBERS) + 1):
        for direction in DIRECTIONS:
            for start in range(len(CIRCLES[unit])):
                yield Sum(unit, number, direction, start)


def digits(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(n))


def copy(rng: random.Random) -> Document:
    drawn = digits(rng, COPY_LENGTH)
    return Document("copy", f"copy {drawn} :", drawn)


def about_probabilities(unit: Unit, answer: int) -> list[float]:
    """What `about ...` says in the world when the right answer is `answer`: one number per name."""
    n = len(CIRCLES[unit])
    found = [0.0] * n
    for off, share in KERNEL.items():
        found[(answer + off) % n] += share
    return found


def weights(document: Document) -> list[float]:
    """The weight in the loss of each token of `<bos> text <eos>`."""
    asks, answers = len(document.prompt.split()), len(document.answer.split())
    return [PROMPT_WEIGHT] * (1 + asks) + [1.0] * answers + [PROMPT_WEIGHT]


def train_tokenizer(folder: str, words: Sequence[str]) -> None:
    """A word-per-token tokenizer over a closed vocabulary, saved to `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pad, bos, eos, unknown = SPECIAL
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        padding_side="left",
        model_max_length=32,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
