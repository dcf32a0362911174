"""T-JEPA: text encoders pretrained by predicting representations instead of tokens."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_tjepa import TJEPAConfig
from .modeling_tjepa import (
    TJEPAForMaskedLM,
    TJEPAForPreTraining,
    TJEPAForPreTrainingOutput,
    TJEPAForQuestionAnswering,
    TJEPAForSequenceClassification,
    TJEPAForTokenClassification,
    TJEPAModel,
    TJEPAPreTrainedModel,
)


# After `import tjepa` the Auto classes know T-JEPA folders without `trust_remote_code`.
AutoConfig.register(TJEPAConfig.model_type, TJEPAConfig)
AutoModel.register(TJEPAConfig, TJEPAModel)
AutoModelForPreTraining.register(TJEPAConfig, TJEPAForPreTraining)
AutoModelForSequenceClassification.register(TJEPAConfig, TJEPAForSequenceClassification)
AutoModelForTokenClassification.register(TJEPAConfig, TJEPAForTokenClassification)
AutoModelForQuestionAnswering.register(TJEPAConfig, TJEPAForQuestionAnswering)
AutoModelForMaskedLM.register(TJEPAConfig, TJEPAForMaskedLM)


__all__ = [
    "TJEPAConfig",
    "TJEPAForMaskedLM",
    "TJEPAForPreTraining",
    "TJEPAForPreTrainingOutput",
    "TJEPAForQuestionAnswering",
    "TJEPAForSequenceClassification",
    "TJEPAForTokenClassification",
    "TJEPAModel",
    "TJEPAPreTrainedModel",
]
