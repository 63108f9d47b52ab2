"""One feature of a dictionary as a steering vector, and the features that tell two labels apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_steering_plugin.adapters.sae_parts import (
    architecture,
    decoder_rows,
    site_names,
    whole_codes,
)
from sae_steering_plugin.directions.codes import FiredCodes, code_scale, identity, same_site
from sae_steering_plugin.directions.heldout import auroc, grouped_folds
from sae_steering_plugin.directions.recipe import recipe_of
from sae_steering_plugin.types import Labelled, Recipe, Selection, SteeringVector


def feature_vector(
    dictionary: Any,
    feature: int,
    *,
    labelled: Labelled | None = None,
    max_activation: float | None = None,
    mean_norm: float | None = None,
    positive: str = "",
    label: str = "",
    sae_id: str | None = None,
) -> SteeringVector:
    """The decoder row of one feature, as `decode` uses it, with what its strength units need.

    Strength 1.0 (raw) adds the row once; in `max_activation` units it adds what the feature adds
    when it fires hardest. `labelled` supplies what is not given: the largest activation over its
    rows (the read positions only), the mean residual norm, and the mean factor that run-time input
    normalisation puts between a unit of code and the row (kept in `row_norm`). Raises ValueError
    for a feature outside the dictionary and for activations from another hook point.
    """
    d_sae = dictionary.W_dec.shape[0]
    if not 0 <= feature < d_sae:
        raise ValueError(f"feature {feature} is outside 0..{d_sae - 1} of this dictionary")
    read_name, hook_name = site_names(dictionary)
    row = decoder_rows(dictionary, [feature])[0].cpu()
    row_norm, name = float(row.norm()), identity(dictionary) if sae_id is None else sae_id
    settings: dict[str, Any] = {"feature": feature}
    recipe = Recipe(method="feature", positive=positive or f"adds feature {feature}", sae_id=name)
    if labelled is not None:
        if not same_site(labelled.hook_name, read_name):
            raise ValueError(
                f"activations come from {labelled.hook_name!r} and the dictionary was trained on "
                f"{read_name!r}"
            )
        scale = code_scale(dictionary, labelled.activations)
        row_norm *= scale
        settings["code_scale"] = scale
        if max_activation is None:
            settings["max_activation_over"] = f"{len(labelled)} read positions"
            max_activation = float(_codes_of(dictionary, feature, labelled.activations).max())
        recipe = recipe_of(
            labelled,
            "feature",
            positive=positive or f"adds feature {feature}",
            sae_id=name,
            mean_norm=mean_norm if hook_name == read_name else mean_norm or float("nan"),
        )
        settings = {**recipe.settings, **settings}
    elif dictionary.cfg.metadata.model_name:
        recipe = Recipe(
            "feature",
            recipe.positive,
            str(dictionary.cfg.metadata.model_name),
            name,
            mean_norm=mean_norm,
        )
    return SteeringVector(row, hook_name, recipe, label or f"feature {feature}").with_recipe(
        settings=settings, max_activation=max_activation or None, row_norm=row_norm
    )


def _codes_of(
    dictionary: Any, feature: int, activations: Float[Tensor, "example d_model"]
) -> Float[Tensor, " example"]:
    if architecture(dictionary) == "temporal":
        raise ValueError(
            "codes of a temporal dictionary depend on all earlier tokens: measure its largest "
            "activation on whole texts and pass max_activation="
        )
    parts = []
    for x in activations.float().split(256):
        with torch.no_grad():
            codes = whole_codes(dictionary, x[:, None].to(dictionary.W_dec.device))
        parts.append(codes[:, 0, feature].cpu())
    return torch.cat(parts)


def standardised_difference(
    values: Float[Tensor, "example fired"], labels: Int[Tensor, " example"]
) -> Float[Tensor, " fired"]:
    """Per column: mean at label 1 minus mean at label 0, over the pooled deviation (ddof 1).

    0 where a column is constant. A column that is constant within each class and differs between
    them is measured against a millionth of its largest value, so it ranks first and stays finite.
    """
    one, zero = values[labels == 1].double(), values[labels == 0].double()
    if len(one) < 2 or len(zero) < 2:
        raise ValueError("each label needs at least two examples to measure a deviation")
    squares = sum((side - side.mean(0)).square().sum(0) for side in (one, zero))
    deviation = (torch.as_tensor(squares) / (len(one) + len(zero) - 2)).sqrt()
    floor = 1e-6 * values.double().abs().amax(0).clamp_min(1e-30)
    return ((one.mean(0) - zero.mean(0)) / deviation.clamp_min(floor)).float()


def rank_features(
    codes: FiredCodes,
    labels: Int[Tensor, " example"],
    groups: Sequence[str],
    *,
    top_n: int = 20,
    both_signs: bool = False,
    concept: str = "",
    seed: int = 0,
) -> Selection:
    """Features that are larger at label 1, best first, chosen on half of the groups.

    They are ranked by the standardised mean difference on that half (`train_d`); `heldout_d` and
    `heldout_auroc` are measured on the other half, which had no part in the choice. `both_signs`
    ranks by absolute value, so features that are larger at label 0 appear with a negative
    `train_d`.
    """
    (train, test), *_ = grouped_folds(labels, groups, n_folds=2, seed=seed)
    difference = standardised_difference(codes.values[train], labels[train])
    ranking = difference.abs() if both_signs else difference
    order = ranking.sort(descending=True, stable=True).indices
    best = [int(i) for i in order[:top_n] if ranking[i] > 0]
    chosen, y = codes.values[test][:, best], labels[test]
    held = standardised_difference(chosen, y)
    return Selection(
        features=tuple(int(codes.latents[i]) for i in best),
        scores={
            "train_d": tuple(float(difference[i]) for i in best),
            "heldout_d": tuple(float(value) for value in held),
            "heldout_auroc": tuple(auroc(column, y) for column in chosen.T),
        },
        concept=concept,
        sae_id=codes.sae_id,
        settings={
            "seed": seed,
            "both_signs": both_signs,
            "train_rows": len(train),
            "heldout_rows": len(test),
            "fired": len(codes.latents),
        },
    )
