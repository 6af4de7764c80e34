"""Language models: the `LanguageModel` protocol, the embedded backend, per-row adapters and the starter checkpoint."""

from preconcert.models.adapters import LoraSettings
from preconcert.models.check import check_backend
from preconcert.models.constrained import (
    UNCONSTRAINED,
    UNSCORED,
    ConstrainedOutput,
    add_constrained_head,
    constrained_logprobs,
    grammar_table,
)
from preconcert.models.language_model import (
    ChoiceRequest,
    Completion,
    CompletionEnd,
    GenerateRequest,
    LanguageModel,
    LatentModel,
    Placed,
    ScoreRequest,
    SpeakRequest,
    Watched,
)
from preconcert.models.latents import Fill, Fills, LatentCodec, LatentMethod, LatentSettings, quantised
from preconcert.models.loading import check_model_name, load_checkpoint
from preconcert.models.routing import AdapterRoute, route_rows
from preconcert.models.starter import StarterSettings, build_starter
from preconcert.models.transformers_model import TransformersModel
from preconcert.models.vllm_settings import VLLMSettings

__all__ = [
    "UNCONSTRAINED",
    "UNSCORED",
    "AdapterRoute",
    "ChoiceRequest",
    "Completion",
    "CompletionEnd",
    "ConstrainedOutput",
    "Fill",
    "Fills",
    "GenerateRequest",
    "LanguageModel",
    "LatentCodec",
    "LatentMethod",
    "LatentModel",
    "LatentSettings",
    "LoraSettings",
    "Placed",
    "ScoreRequest",
    "SpeakRequest",
    "StarterSettings",
    "TransformersModel",
    "VLLMSettings",
    "Watched",
    "add_constrained_head",
    "build_starter",
    "check_model_name",
    "check_backend",
    "constrained_logprobs",
    "grammar_table",
    "load_checkpoint",
    "quantised",
    "route_rows",
]
