"""The tasks that recipes train for, one module each."""

from hf_sparse.recipes.tasks.answer import Answering
from hf_sparse.recipes.tasks.classify import Classification
from hf_sparse.recipes.tasks.distill import Distillation
from hf_sparse.recipes.tasks.image import ImageClassification
from hf_sparse.recipes.tasks.language import Causal, Masked
from hf_sparse.recipes.tasks.parent import Task
from hf_sparse.recipes.tasks.retrieve import Retrieval
from hf_sparse.recipes.tasks.summarize import Summarization
from hf_sparse.recipes.tasks.tag import Tagging

TASKS: dict[str, type[Task]] = {
    "classify": Classification,
    "answer": Answering,
    "tag": Tagging,
    "summarize": Summarization,
    "mlm": Masked,
    "clm": Causal,
    "retrieve": Retrieval,
    "classify-images": ImageClassification,
    "distill": Distillation,
}
