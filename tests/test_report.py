import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch

from sae_steering_plugin.report import demo_page, effect_rows, headline, write_report
from sae_steering_plugin.runs.demo import Demo
from sae_steering_plugin.runs.transcripts import Rollout, Rollouts
from sae_steering_plugin.types import Recipe, Selection, SteeringVector
from tests.test_plots import effect

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>"
VOID = {"meta", "br", "img", "rect", "line", "path", "circle", "polyline"}


class Page(HTMLParser):
    """Collects the tags and checks that every element is closed by its own tag."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def a_demo(**changes: object) -> Demo:
    """A small, complete record, made by hand."""
    recipe = Recipe("probe", positive="acts alone", n=8, mean_norm=2.0, scores={"auroc": 0.9})
    vectors = tuple(
        SteeringVector(torch.eye(4)[i], "blocks.0.hook_resid_post", recipe, label=f"v{i}")
        for i in range(2)
    )
    spoken = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": ATTACK},
    )
    rollouts = Rollouts(
        (Rollout("s1", "unsteered", spoken, 1, ()), Rollout("s1", "steered", spoken, 1, ())),
        {"unsteered": {}, "steered": {}},
    )
    known = Demo(
        model="agent",
        sae="topk",
        trait="autonomy",
        outcome="autonomy",
        strength=0.4,
        seed=3,
        vectors=vectors,
        selection=Selection((7, 2), {"train_d": (1.5, float("nan"))}, "autonomy", "topk"),
        headline=(effect("decoded probe", 0.4), effect("PCA", 0.4, 0.1)),
        curve=(effect("decoded probe", 0.8, 1.4), effect("decoded probe", 0.4, positions="decode")),
        controls=tuple(effect("random", 0.4, d) for d in (-0.1, 0.3)),
        validation=(effect("decoded probe", 0.4),),
        examples=(("s1", "before " + ATTACK, "after"),),
        rollouts=rollouts,
        seconds=12.34,
        versions={"torch": "2"},
        settings={"probe_scores": "R2 " + ATTACK, "strengths": [0.4, 0.8]},
    )
    return replace(known, **changes)  # type: ignore[arg-type]


def test_the_page_is_one_closed_tree_that_fetches_nothing() -> None:
    page = Page()
    text = demo_page(a_demo())
    page.feed(text)
    assert not page.open
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed"}
    for _, attributes in page.tags:
        assert not set(attributes) & {"src", "href", "onerror", "onload", "onclick"}
    assert "default-src 'none'" in text
    assert not re.search(r"url\(|@import", text)


@pytest.mark.parametrize(
    "changes",
    [
        {"trait": ATTACK},
        {"model": ATTACK},
        {"sae": ATTACK},
        {"outcome": ATTACK},
        {"notes": (ATTACK,)},
        {"versions": {ATTACK: ATTACK}},
        {"settings": {ATTACK: [ATTACK], "probe_scores": ATTACK}},
        {"headline": (effect(ATTACK, positions=ATTACK, test=ATTACK, outcome=ATTACK),)},
        {"examples": ((ATTACK, ATTACK, ATTACK),)},
        {"selection": Selection((1,), {ATTACK: (1.0,)}, ATTACK, ATTACK)},
        {
            "vectors": (
                SteeringVector(
                    torch.ones(4), ATTACK, Recipe(ATTACK, positive=ATTACK), label=ATTACK
                ),
            )
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_stands_in_a_record_is_shown_as_text(changes: dict[str, object]) -> None:
    page = Page()
    page.feed(demo_page(a_demo(**changes)))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert ATTACK in page.text


def test_the_page_shows_forecast_against_measured_side_effects() -> None:
    axis = {
        "axis": "stability",
        "label": "stability_abs",
        "n_features": 40,
        "spearman_heldout": 0.42,
        "low": 0.11,
        "high": 0.67,
        "clean_mean": 0.816,
        "random_mean": 0.809,
        "messy_mean": 0.78,
        "group_size": 10,
    }
    page = Page()
    page.feed(demo_page(a_demo(side_effects=(axis,))))
    for words in ("stability_abs", "0.420 (0.110 to 0.670)", "0.816", "group holds 10 features"):
        assert words in page.text


def test_the_page_says_what_was_found_and_what_is_missing() -> None:
    page = Page()
    page.feed(demo_page(a_demo()))
    for words in (
        "from 0.50 to 0.90 on 200 held-out items",
        "2 random directions of the same length (n = 200 each) moved it by |d| = 0.20 on average",
        "No forecast was made",
        "chosen on validation items",
        "before",
        "after",
    ):
        assert words in page.text


def test_the_headline_is_the_first_methods() -> None:
    assert "'autonomy' at 0.4 mean residual norms" in headline(a_demo())
    assert "No random directions were run" in headline(a_demo(controls=()))


def test_rows_use_the_adjusted_p_and_a_dash_for_the_unknown() -> None:
    rows = effect_rows([effect(p_value=0.01, p_adjusted=0.0004), effect(valid_rate=float("nan"))])
    assert rows[0]["p"] == "<0.001" and rows[1]["p"] == "0.010" and rows[1]["valid"] == "–"


def test_a_saved_demo_reads_back(tmp_path: Path) -> None:
    from sae_lens import SAE

    demo = a_demo()
    written = demo.save(tmp_path / "out")
    assert write_report(demo, tmp_path / "out").stat().st_size < 200_000
    assert all(path.exists() for path in written)
    summary = json.loads(
        (tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail
    )
    assert set(summary) >= {
        *("versions", "seed", "model", "sae", "seconds", "dose_response", "controls"),
        *("side_effects", "selection"),
    }
    assert summary["side_effects"] == []
    assert len(summary["dose_response"]) == 4 and len(summary["controls"]) == 2
    assert set(summary["dose_response"][0]) >= {
        *("method", "trait", "strength", "positions", "n", "effect_d", "ci_low", "ci_high"),
        *("p_value", "valid_rate"),
    }
    assert summary["selection"][1] == {"feature": 2, "train_d": None}
    table = pd.read_parquet(tmp_path / "out" / "effects.parquet")
    assert list(table["stage"]) == ["headline"] * 2 + ["curve"] * 2 + ["control"] * 2 + [
        "validation"
    ]
    assert Rollouts.load(tmp_path / "out" / "rollouts.parquet").rollouts == demo.rollouts.rollouts  # type: ignore[union-attr]
    loaded = SAE.load_from_disk(tmp_path / "out" / "vectors").vectors()
    assert [one.label for one in loaded] == ["v0", "v1"]
    assert torch.equal(loaded[0].vector, demo.vectors[0].vector)


def test_the_picture_holds_the_curve_and_every_method_at_one_position_rule(tmp_path: Path) -> None:
    write_report(a_demo(), tmp_path)
    drawing = (tmp_path / "dose_response.svg").read_text()
    assert drawing.count("positions all: d") == 5 and "positions decode" not in drawing
    assert 'xmlns="http://www.w3.org/2000/svg"' in drawing


def test_the_same_record_gives_the_same_page() -> None:
    assert demo_page(a_demo()) == demo_page(a_demo())
