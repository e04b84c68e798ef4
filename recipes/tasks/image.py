"""Classification of images at high resolution."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from datasets import Dataset, Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_sparse.errors import RecipeError
from hf_sparse.recipes.arguments import RecipeArguments
from hf_sparse.recipes.reading import Reading
from hf_sparse.recipes.tasks.classify import Classification


class ImageClassification(Classification):
    """Images with one label or several; a folder of images for each label, in one for each split, will do."""

    auto = AutoModelForImageClassification
    truncated = "dense, images as large as it knows"
    more: ClassVar[Mapping[str, Any]] = {"train_sampling_strategy": "random", "include_num_input_tokens_seen": "no"}

    @classmethod
    def columns(cls, arguments: RecipeArguments) -> tuple[str, ...]:
        return arguments.text_column or "image", arguments.label_column or "label"

    @classmethod
    def processor(cls, source: str) -> Any:
        return AutoImageProcessor.from_pretrained(source)

    def encode(self, split: Dataset, kind: str, tokenizer: Any, reading: Reading) -> Dataset:
        image, label = self.columns(self.arguments)
        if not isinstance(split.features[image], Image):
            raise RecipeError(f"column {image!r} of the {kind} split holds no images")
        self.count(split, kind)
        # images are read when they are needed: pixels take far more room than files
        return split.remove_columns(label).add_column("labels", [self.numbers(one, kind) for one in split[label]])

    def collate(self, rows: list[dict[str, Any]], tokenizer: Any, reading: Reading) -> dict[str, Tensor]:
        image, _ = self.columns(self.arguments)
        pixels = tokenizer([row[image].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
        labels = torch.tensor([row["labels"] for row in rows])
        return {"pixel_values": pixels, "labels": labels.float() if self.is_multilabel else labels}

    def collator(self, tokenizer: Any, model: Any, reading: Reading) -> Any:
        return lambda rows: self.collate(rows, tokenizer, reading)
