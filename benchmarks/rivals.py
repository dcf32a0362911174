"""Others' ways to go on training a sentence encoder without labels, for adaptation.py.

By transformers and sentence-transformers:

- `mlm`: masked language modelling at 30%;
- `simcse`: a text is told, under another dropout, from those of its batch (arXiv 2104.08821);
- `halves`: a text's second half is told by the first from those of its batch, and nothing else;
- `tsdae`: a decoder restores a text from the vector of what is left of it (arXiv 2104.06979).
"""

import random
import time
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import DenoisingAutoEncoderLoss, MultipleNegativesRankingLoss
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from tjepa.downstream.before_after import halves


RIVALS = ("mlm", "simcse", "halves", "tsdae")
DELETED_SHARE = 0.6  # of the words, in TSDAE's paper
MASKED_SHARE = 0.3
LEARNING_RATE, BATCH_SIZE = 3e-5, 16  # the batch is that of configs/adapt.yaml


def train_rival(
    name: str, texts: list[str], encoder: str, folder: Path, seed: int, num_steps: int, max_length: int
) -> float:
    """Goes on training, saves the encoder to `folder`, and returns the CPU seconds of the steps."""
    args = {
        "output_dir": str(folder),
        "max_steps": num_steps,
        "per_device_train_batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 0.1,
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if name == "mlm":
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        rows = Dataset.from_list([tokenizer(text, truncation=True, max_length=max_length).data for text in texts])
        collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED_SHARE)
        model = AutoModelForMaskedLM.from_pretrained(encoder)
        trainer, trained = Trainer(model, TrainingArguments(**args), collator, rows), model.base_model
    else:
        trained = SentenceTransformer(encoder, device="cpu")
        trained.max_seq_length = max_length
        draw = random.Random(seed)
        pair = {
            "simcse": lambda text: (text, text),
            "halves": halves,
            "tsdae": lambda text: (damaged(text, draw), text),
        }
        first, second = zip(*map(pair[name], texts), strict=True)
        pairs = Dataset.from_dict({"first": first, "second": second})
        loss = (DenoisingAutoEncoderLoss if name == "tsdae" else MultipleNegativesRankingLoss)(trained)
        trainer = SentenceTransformerTrainer(trained, SentenceTransformerTrainingArguments(**args), pairs, loss=loss)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    trained.save_pretrained(str(folder))
    return seconds


def damaged(text: str, draw: random.Random) -> str:
    words = text.split()
    return " ".join([word for word in words if draw.random() >= DELETED_SHARE] or [draw.choice(words)])
