"""T-JEPA: text encoders pretrained by predicting representations instead of tokens."""

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining

from .configuration_tjepa import TJEPAConfig
from .modeling_tjepa import TJEPAForPreTraining, TJEPAForPreTrainingOutput, TJEPAModel, TJEPAPreTrainedModel


# After `import tjepa` the Auto classes know T-JEPA folders without `trust_remote_code`.
AutoConfig.register(TJEPAConfig.model_type, TJEPAConfig)
AutoModel.register(TJEPAConfig, TJEPAModel)
AutoModelForPreTraining.register(TJEPAConfig, TJEPAForPreTraining)


__all__ = ["TJEPAConfig", "TJEPAForPreTraining", "TJEPAForPreTrainingOutput", "TJEPAModel", "TJEPAPreTrainedModel"]
