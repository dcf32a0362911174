"""T-JEPA: text encoders pretrained by predicting representations instead of tokens.

Notable: `import tjepa` alone imports neither torch nor transformers, which take seconds. All the same the Auto classes
of transformers then know T-JEPA folders without `trust_remote_code`, whichever of the two is imported first.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .configuration_tjepa import TJEPAConfig
    from .downstream.embedding import embed
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


# what is imported when it is asked for, and from where
PLACES = {"TJEPAConfig": "configuration_tjepa", "embed": "downstream.embedding"}
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
    "embed",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        with suppress(PackageNotFoundError):  # a clone that is not installed
            return version("tjepa")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{PLACES.get(name, 'modeling_tjepa')}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Registration(threading.local):
    """
    Registers T-JEPA as soon as the Auto classes are imported: when the outermost import of transformers or of this
    package ends, because until then either may be imported in part. It finds their modules as Python does.
    """

    depth = 0  # imports of the two packages that this thread is in
    is_done = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if self.is_done or name.partition(".")[0] not in ("transformers", __name__):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                with self.importing():
                    execute(module)

            spec.loader.exec_module = exec_module
        return spec

    @contextmanager
    def importing(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
            if self.depth == 1 and not self.is_done:
                self.register()
        finally:
            self.depth -= 1

    def register(self) -> None:
        if auto := sys.modules.get("transformers.models.auto.configuration_auto"):
            ours = import_module(".configuration_tjepa", __name__)
            auto.AutoConfig.register(ours.TJEPAConfig.model_type, ours.TJEPAConfig, exist_ok=True)
            if auto := sys.modules.get("transformers.models.auto.modeling_auto"):
                models = import_module(".modeling_tjepa", __name__)
                for auto_class, place in ours.AUTO_MAP.items():
                    if auto_class != "AutoConfig":
                        model_class = getattr(models, place.rpartition(".")[2])
                        getattr(auto, auto_class).register(ours.TJEPAConfig, model_class, exist_ok=True)
                type(self).is_done = True


_registration = _Registration()
sys.meta_path.insert(0, _registration)
with _registration.importing():  # what is imported already
    pass
