"""Contrastive distillation: a student's features must pick out its teacher's, example by example.

Three sources of negatives: a memory bank with an entry per training example, the batch, and a
queue of past batches. All compute in fp32, never wait for the GPU in a single process, and keep what
they need to resume bit for bit in buffers. Across processes every rank feeds them, with batches that
may differ in size, and the buffers agree on all ranks, so that DistributedDataParallel may be given
``broadcast_buffers=False``.
"""

from bertkd.contrast.in_batch import InBatchContrast
from bertkd.contrast.memory_bank import MemoryBankContrast
from bertkd.contrast.queue import QueueContrast

__all__ = ["InBatchContrast", "MemoryBankContrast", "QueueContrast"]
