"""Data for distillation: labelled tasks, offline docstring tasks, pretraining text, batches."""

from bertkd.data.blocks import TextBlocks, load_blocks
from bertkd.data.collate import Collator
from bertkd.data.corpus import Corpus, open_corpus
from bertkd.data.docstring_cache import read_docstrings
from bertkd.data.mlm import MaskingCollator
from bertkd.data.pydocs import RetrievalData, load_retrieval
from bertkd.data.sampler import LengthBucketSampler
from bertkd.data.tasks import TaskData, encode_task, is_built_in, load_task

__all__ = [
    "Collator",
    "Corpus",
    "LengthBucketSampler",
    "MaskingCollator",
    "RetrievalData",
    "TaskData",
    "TextBlocks",
    "encode_task",
    "is_built_in",
    "load_blocks",
    "load_retrieval",
    "load_task",
    "open_corpus",
    "read_docstrings",
]
