"""What to read off the rows of a `SASPlan`: scores per strength, shifts with tests, slopes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .choices import summarised

if TYPE_CHECKING:
    import pandas as pd

    from ..types import Effect

ABOUT = ("behaviour", "second", "sae", "method", "tau", "parts", "top_n", "seed", "on", "form")
"""The columns that name an arm beside its strength."""

OUTCOME = "p_match_normalised"


def arm_name(about: Mapping[str, Any]) -> str:
    """An arm in words, without the options that say nothing: "autonomy: sas, tau 0.7"."""
    words = [f"{about['behaviour']}: {about['method']}"]
    if about["seed"] >= 0:
        words[0] += f" {about['seed']}"
    if about["second"]:
        words[0] = f"{about['behaviour']} + {about['second']}: {about['method']}"
    words += [f"tau {about['tau']:g}"]
    words += [] if about["parts"] == "both" else [f"{about['parts']} part"]
    words += [] if about["top_n"] < 0 else [f"top {about['top_n']}"]
    return ", ".join(words)


def summary_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per arm and strength: `choices.summarised`, support, width and displacement."""
    import pandas as pd

    columns = [*ABOUT, "strength", "strength_2"]
    rows = [
        {
            **dict(zip(columns, key, strict=True)),
            "support": int(part["support"].iloc[0]),
            "d_sae": int(part["d_sae"].iloc[0]),
            "displacement": float(part["displacement"].iloc[0]),
            **summarised(part),
        }
        for key, part in table.groupby(columns, sort=False, dropna=False)
    ]
    kept = [*columns, "support", "d_sae", "displacement", OUTCOME]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=kept)


def shift_effects(
    table: pd.DataFrame, *, outcome: str = OUTCOME, seed: int = 0, correction: str = "holm"
) -> list[tuple[Mapping[str, Any], Effect]]:
    """The shift of each arm and strength against strength 0 on the same items, with its arm.

    Paired permutation and bootstrap over wording groups where items name them. Corrected over all
    that are given, so give one family: random controls and grids of two vectors are left out.
    """
    from ..effects.contrast import corrected, effect

    alone = table[table["strength_2"].isna() & (table["method"] != "random matched")]
    arms, found = [], []
    for key, part in alone.groupby(list(ABOUT), sort=False, dropna=False):
        base = part[part["strength"] == 0].set_index("item")
        for strength, rows in part[part["strength"] != 0].groupby("strength"):
            steered = rows.set_index("item").loc[base.index]
            groups = base["group"]
            about = dict(zip(ABOUT, key, strict=True))
            found.append(
                effect(
                    base[outcome].to_numpy(),
                    steered[outcome].to_numpy(),
                    method=about["method"],
                    outcome=outcome,
                    strength=strength,
                    unit="raw",
                    sign=1 if strength > 0 else -1,
                    seed=seed,
                    clusters=list(groups) if groups.astype(bool).all() else None,
                    trait=about["behaviour"],
                    displacement=float(rows["displacement"].iloc[0]),
                )
            )
            arms.append(about)
    return list(zip(arms, corrected(found, correction=correction), strict=True))


def shift_rows(
    table: pd.DataFrame, *, outcome: str = OUTCOME, seed: int = 0
) -> list[dict[str, Any]]:
    """`shift_effects` as rows to print."""
    return [
        {
            "arm": arm_name(about),
            "sae": about["sae"],
            "form": about["form"],
            "strength": f"{one.strength:+g}",
            **effect_cells(one),
        }
        for about, one in shift_effects(table, outcome=outcome, seed=seed)
    ]


def effect_cells(one: Effect) -> dict[str, Any]:
    """An effect's figures as a row shows them; no adjusted p where it was not corrected."""
    adjusted = one.p_adjusted
    return {
        "n": one.n,
        "score": f"{one.base_mean:.3f} to {one.arm_mean:.3f}",
        "d": round(one.d, 2),
        "interval": f"{one.ci_low:.2f} to {one.ci_high:.2f}",
        "p": float(f"{one.p_value:.2g}"),
        "adjusted": "" if adjusted != adjusted else float(f"{adjusted:.2g}"),
    }


def control_rows(table: pd.DataFrame, *, outcome: str = OUTCOME) -> list[dict[str, Any]]:
    """Shifts of random directions as long as SAS, per behaviour and strength over the seeds."""
    rows = []
    random = table[table["method"] == "random matched"]
    keys = ["behaviour", "sae", "on", "form"]
    for key, part in random.groupby(keys, sort=False):
        means = part.groupby(["strength", "seed"])[outcome].mean().unstack()
        for strength in (one for one in means.index if one != 0):
            shifts = means.loc[strength] - means.loc[0.0]
            rows.append(
                {
                    **dict(zip(keys, key, strict=True)),
                    "strength": float(strength),
                    "directions": int(shifts.notna().sum()),
                    "mean shift": round(float(shifts.mean()), 3),
                    "largest |shift|": round(float(shifts.abs().max()), 3),
                }
            )
    return rows


def score_rows(table: pd.DataFrame, *, outcome: str = OUTCOME) -> list[dict[str, Any]]:
    """One row per arm: the mean score under each strength.

    `length` is the displacement at the largest strength in residual norms, `mass` the least letter
    mass under any strength. Random controls and grids of two vectors are left out.
    """
    found = summary_table(table)
    alone = found[found["strength_2"].isna() & (found["method"] != "random matched")]
    shown = []
    for key, part in alone.groupby(list(ABOUT), sort=False, dropna=False):
        about = dict(zip(ABOUT, key, strict=True))
        top = part.sort_values("strength").iloc[-1]
        latents = int(top["support"])
        shown.append(
            {
                "arm": arm_name(about),
                "sae": about["sae"],
                "on": about["on"],
                "form": about["form"],
                "latents": "" if latents < 0 else f"{latents}/{top['d_sae']}",
                "length": rounded(top["displacement"], 2),
                **{
                    signed(row["strength"]): rounded(row[outcome])
                    for row in part.to_dict("records")
                },
                "mass": rounded(part["letter_mass"].min()),
            }
        )
    return shown


def unsteered_rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """One row per question set and form at strength 0: both scores, letter mass, by matching
    letter, and the position bias."""
    plain = (table["method"] == "sas") & (table["second"] == "") & (table["strength"] == 0)
    rows = []
    for (on, form), part in table[plain].groupby(["on", "form"], sort=False):
        once = summarised(part[part["line"] == part["line"].iloc[0]])
        rows.append(
            {
                "set": on,
                "form": form,
                "n": once["n"],
                "raw": rounded(once["p_match"]),
                "normalised": rounded(once[OUTCOME]),
                "letter mass": rounded(once["letter_mass"]),
                "chosen": rounded(once["chosen"]),
                "(A) matches": rounded(once["score_first"]),
                "(B) matches": rounded(once["score_second"]),
                "position bias": rounded(once["position_bias"]),
            }
        )
    return rows


def signed(strength: float) -> str:
    return f"{strength:+g}" if strength else "0"


def rounded(value: float, digits: int = 3) -> float | str:
    """A figure for a table; an empty cell where there is none."""
    return "" if value != value else round(float(value), digits)


def own_response(table: pd.DataFrame, *, outcome: str = OUTCOME) -> list[dict[str, Any]]:
    """How much each metric of a two-vector grid answers to either strength.

    Slopes of the mean score on a plane over the grid (least squares): change per unit of the first
    and of the second strength. `own` is the strength of the vector built for the metric.
    Compositionality means that the own slope is large and the other one small.
    """
    import numpy as np

    rows = []
    grids = table[table["second"] != ""]
    keys = ["behaviour", "second", "sae", "tau", "on", "form"]
    for key, part in grids.groupby(keys, sort=False):
        means = part.groupby(["strength", "strength_2"])[outcome].mean().reset_index()
        design = np.column_stack([means["strength"], means["strength_2"], np.ones(len(means))])
        slopes = np.linalg.lstsq(design, means[outcome].to_numpy(), rcond=None)[0]
        about = dict(zip(keys, key, strict=True))
        first = about["on"] == about["behaviour"]
        own, other = (slopes[0], slopes[1]) if first else (slopes[1], slopes[0])
        rows.append(
            {
                "vectors": f"{about['behaviour']} + {about['second']}",
                "metric": about["on"],
                "form": about["form"],
                "own": round(float(own), 4),
                "other": round(float(other), 4),
            }
        )
    return rows
