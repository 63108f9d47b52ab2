"""Steering with sparse autoencoder features, inside TransformerLens and SAELens.

Importing this package loads neither PyTorch nor a host: every public name is looked up when it is
first used. The `"steering"` architecture is registered with SAELens as soon as SAELens is imported,
whoever imports it and in whichever order, so that `SAE.load_from_disk` reads a steering dictionary.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names for editors and type checkers; a test holds the two lists equal
    from .adapters.engine import generate
    from .adapters.feature_metadata import keep_table, kept_table
    from .adapters.sae_lens import SteeringDictionary, load_sae
    from .adapters.steering import fwd_hooks, steer
    from .adapters.training_hooks import (
        ConceptAblation,
        ConceptGradientEdit,
        PreventativeSteering,
        training_callback,
        training_hooks,
    )
    from .adapters.transformer_lens import load_model
    from .adapters.weights import NotConvertible, carried_sites, residual_sites, to_bias_edit
    from .directions import (
        caa_vector,
        correlation_vector,
        diff_mean_vector,
        feature_vector,
        fgaa_vector,
        pca_vector,
        probe_vector,
        sae_ts_vector,
        sas_vector,
        spare_vector,
        srs_vector,
        sta_vector,
    )
    from .edits import (
        Ablate,
        Add,
        Clamp,
        Exchange,
        FeatureFires,
        FollowPath,
        Fuzz,
        Gated,
        ProjectOut,
        Scale,
        SimilarTo,
        SparseAdd,
        concept_path,
    )
    from .effects import (
        agreement,
        behaviour_axis,
        compare,
        cross_trait_matrix,
        dose_reading,
        evidence_tier,
        fit_belief,
        vector_axis,
    )
    from .features import forget_features, label_features, score_features
    from .organisms import list_organisms, load_organism
    from .prediction import SideEffectPredictor, cross_validate, fit_predictor
    from .runs.autonomy import autonomy_protocol, run_autonomy
    from .runs.axbench.evaluation import run_axbench
    from .runs.axbench.files import read_axbench
    from .runs.belief import belief_grid
    from .runs.calibrate import calibrate_strength
    from .runs.choices import evaluate_choices
    from .runs.collect import collect_contrast, collect_labelled
    from .runs.contrast_files import read_contrast
    from .runs.data_screening import preference_disparity, projection_difference
    from .runs.export import (
        export_checkpoint,
        export_gguf,
        export_lm_eval,
        read_gguf,
        read_lm_eval,
    )
    from .runs.feature_effects import collect_effects
    from .runs.feature_statistics import coactivation, feature_statistics
    from .runs.feature_tables import decoder_geometry, logit_footprint
    from .runs.gradient_statistics import gradient_statistics
    from .runs.judges import judge_agreement, open_judge
    from .runs.learning import learning_report, preference_report
    from .runs.learning_record import GradientRecord
    from .runs.open_ended import evaluate_open_ended
    from .runs.option_choice import choose_options
    from .runs.outcome_correlation import collect_outcomes
    from .runs.probe_comparison import compare_probes, quiver_of_arrows
    from .runs.probe_perturbation import collect_pooled, perturb_probes, remove_spurious
    from .runs.rollout_plan import RolloutPlan
    from .runs.rollouts import dose_response, run_rollouts
    from .runs.runner import InProcess, RayRunner, run_shard
    from .runs.screening import screen
    from .runs.selection import select_features
    from .runs.side_effects import measure_side_effects
    from .runs.steering_methods import ConceptData, find_method
    from .runs.updates import update_report, weight_report
    from .runs.validation import validate_selection
    from .runs.weights import lora_vector, rank_one_edit
    from .types import (
        AFTER_PROMPT,
        ALL,
        DECODE,
        LAST,
        PREFILL,
        Contrast,
        Edit,
        Effect,
        FeatureTable,
        Labelled,
        Positions,
        Recipe,
        Scenario,
        Scores,
        Selection,
        SparseCodes,
        SteeringVector,
    )

__version__ = "0.1.0"

_ROOMS: dict[str, str] = {
    "types": "SteeringVector Recipe Positions ALL PREFILL DECODE LAST AFTER_PROMPT Edit Contrast "
    "Labelled FeatureTable Selection Scores Effect SparseCodes Scenario",
    "directions": "feature_vector sas_vector probe_vector diff_mean_vector caa_vector pca_vector "
    "srs_vector sta_vector spare_vector sae_ts_vector fgaa_vector correlation_vector",
    "edits": "Add Clamp Scale Ablate SparseAdd ProjectOut Exchange Gated SimilarTo FeatureFires "
    "FollowPath concept_path Fuzz",
    "effects": "compare cross_trait_matrix behaviour_axis vector_axis dose_reading evidence_tier "
    "agreement fit_belief",
    "features": "forget_features label_features score_features",
    "adapters.engine": "generate",
    "adapters.steering": "steer fwd_hooks",
    "adapters.training_hooks": "ConceptAblation ConceptGradientEdit PreventativeSteering "
    "training_callback training_hooks",
    "adapters.transformer_lens": "load_model",
    "adapters.weights": "to_bias_edit NotConvertible carried_sites residual_sites",
    "adapters.sae_lens": "SteeringDictionary load_sae",
    "adapters.feature_metadata": "keep_table kept_table",
    "organisms": "load_organism list_organisms",
    "prediction": "SideEffectPredictor cross_validate fit_predictor",
    "runs.autonomy": "autonomy_protocol run_autonomy",
    "runs.axbench.evaluation": "run_axbench",
    "runs.axbench.files": "read_axbench",
    "runs.belief": "belief_grid",
    "runs.calibrate": "calibrate_strength",
    "runs.choices": "evaluate_choices",
    "runs.collect": "collect_contrast collect_labelled",
    "runs.contrast_files": "read_contrast",
    "runs.export": "export_checkpoint export_gguf export_lm_eval read_gguf read_lm_eval",
    "runs.feature_effects": "collect_effects",
    "runs.feature_statistics": "coactivation feature_statistics",
    "runs.feature_tables": "decoder_geometry logit_footprint",
    "runs.gradient_statistics": "gradient_statistics",
    "runs.judges": "open_judge judge_agreement",
    "runs.data_screening": "preference_disparity projection_difference",
    "runs.learning": "learning_report preference_report",
    "runs.learning_record": "GradientRecord",
    "runs.updates": "update_report weight_report",
    "runs.open_ended": "evaluate_open_ended",
    "runs.option_choice": "choose_options",
    "runs.outcome_correlation": "collect_outcomes",
    "runs.probe_comparison": "compare_probes quiver_of_arrows",
    "runs.probe_perturbation": "collect_pooled perturb_probes remove_spurious",
    "runs.rollouts": "run_rollouts dose_response",
    "runs.rollout_plan": "RolloutPlan",
    "runs.runner": "InProcess RayRunner run_shard",
    "runs.side_effects": "measure_side_effects",
    "runs.screening": "screen",
    "runs.selection": "select_features",
    "runs.steering_methods": "ConceptData find_method",
    "runs.validation": "validate_selection",
    "runs.weights": "lora_vector rank_one_edit",
}
"""Which module each public name lives in. Reading this table imports none of them."""

_HOME: dict[str, str] = {name: room for room, names in _ROOMS.items() for name in names.split()}

__all__ = sorted(_HOME)

_SAE_ADAPTER = f"{__name__}.adapters.sae_lens"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from difflib import get_close_matches

        near = get_close_matches(name, _HOME, n=3)
        hint = f"; nearest are {', '.join(near)}" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterAfterImport:
    """A finder that registers the architecture right after SAELens has been imported, once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "sae_lens":
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisteringLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _RegisteringLoader:
    """Runs a module's own loader, gives the module back to it, then imports the SAELens adapter."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        spec.loader = self.loader
        module = self.loader.create_module(spec)
        spec.loader = self  # type: ignore[assignment]
        return module

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(_SAE_ADAPTER)


def _register_architecture() -> None:
    """Register now if SAELens is loaded, else when it is; a second call changes nothing."""
    if "sae_lens" in sys.modules:
        importlib.import_module(_SAE_ADAPTER)
    elif not any(type(finder).__name__ == "_RegisterAfterImport" for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())


_register_architecture()
