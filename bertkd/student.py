"""Students made of their teacher's own weights: chosen blocks and, where asked, a slice of them.

The paper's initialisations "4,8,12", "1,8,12" and "1,2,3" (counted from 1) are ``[3, 7, 11]``,
``[0, 7, 11]`` and ``[0, 1, 2]`` here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bertkd import encoders
from bertkd._seeding import seeded
from bertkd.encoders import EncoderSpec
from bertkd.errors import UnsupportedEncoderError, unknown_name, whole_number
from bertkd.layer_maps import uniform_blocks
from bertkd.narrow import Slicer, narrow_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

STRATEGIES = ("first", "last", "uniform")


def create_student(
    teacher: PreTrainedModel,
    layers: str | Sequence[int] = "uniform:3",
    *,
    hidden_size: int | None = None,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    copy_head: bool = False,
    num_labels: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    verbose: bool = True,
) -> PreTrainedModel:
    """Build a student of the teacher's class from the teacher's weights.

    Embeddings, the chosen blocks with their LayerNorms, final norm and pooler are copied; the
    task head is new unless ``copy_head``. With all blocks, ``copy_head=True`` and the teacher's
    dtype the student computes bit for bit what the teacher does (one cast by ``.to(bfloat16)`` has
    rounded its rotary frequencies; the student has them exact, as a teacher loaded anew). It shares
    no memory with the teacher, is on its device, requires gradients, and is in eval mode (as after
    ``from_pretrained``). Each block keeps its kind of attention (ModernBERT's local or global).
    ModernBERT's block 0 has no ``attn_norm``, so the first student block loses that of any other
    teacher block.

    A narrower student gets a slice, see `bertkd.narrow.Slicer`: of every axis the first
    coordinates, heads kept apart. That is a start for training, not a model that works.

    Args:
        teacher: an encoder that `bertkd.encoders.describe` knows, bare or with a head. Not changed.
        layers: the teacher blocks to keep, see `teacher_layers`.
        hidden_size: width of the student; the teacher's by default.
        num_heads: heads per block; the teacher's by default, so that a narrower student has
            narrower heads. ``hidden_size // head_dim`` keeps whole heads instead.
        intermediate_size: inner width of the feed-forward layers; the teacher's by default.
        copy_head: also copy the task head.
        num_labels: number of labels of the new head; the teacher's by default.
        dtype: of the student's weights; the teacher's by default, but float32 where that is in half
            precision, which has no room for the small updates of training.
        seed: fixes the weights of the new head. The global random state is left as it was.
        verbose: print what went where; otherwise that is logged at level INFO.

    Raises:
        TypeError: if the teacher is no Hugging Face model, or a number is no whole one; see also
            `teacher_layers`.
        UnsupportedEncoderError: if the teacher's architecture is not supported, or its weights are
            quantised, sharded, not loaded (on device ``meta``) or beside adapters of PEFT.
        ValueError: see `teacher_layers` and `bertkd.narrow.narrow_config`; also for
            ``num_labels`` of a model without a head, or that ``copy_head`` contradicts.
    """
    model: Any = encoders.unwrap(teacher)
    base = encoders.base_model(model)
    spec = encoders.describe(model)
    _check_weights(model)
    seed = whole_number("seed", seed)
    kept = teacher_layers(layers, spec.num_blocks)
    config = _shorter_config(model.config, spec, kept)
    widths = {
        "hidden_size": hidden_size,
        "num_heads": num_heads,
        "intermediate_size": intermediate_size,
    }
    if any(width is not None for width in widths.values()):
        narrow_config(config, spec, **widths)
    if num_labels is not None:
        _relabel(config, num_labels, has_head=model is not base, copy_head=copy_head)

    options = {"add_pooling_layer": False} if getattr(model, "pooler", model) is None else {}
    with torch.device("cpu"), seeded(seed):
        wanted = torch.promote_types(model.dtype, torch.float32) if dtype is None else dtype
        student = type(model)._from_config(config, dtype=wanted, **options)
    student = student.to(model.device).eval()

    rows = _fill_base(base, encoders.base_model(student), kept)
    rows += _fill_head(model, student, copy_head, seed)
    table = _table(student, spec, rows)
    if verbose:
        print(table)
    else:
        logger.info(table)
    return student


def teacher_layers(spec: str | Sequence[int], num_teacher: int) -> list[int]:
    """The teacher blocks (0-based, increasing) that a student is made of.

    - ``"first:n"``, ``"last:n"``: the first or last ``n`` blocks;
    - ``"uniform:n"``: the ends of ``n`` even shares, as layer map ``"uniform"``; of 12 blocks,
      ``"uniform:3"`` is ``[3, 7, 11]``;
    - a list ``[0, 7, 11]``, or the same as text, ``"[0, 7, 11]"`` or ``"0,7,11"``.

    Raises:
        TypeError: for anything but text and sequences of whole numbers.
        ValueError: for an unknown strategy, more blocks than there are, none, a number out of
            range, or a list that is not strictly increasing.
    """
    if not isinstance(spec, str):
        return _checked_layers(spec, num_teacher)
    if spec.strip().startswith("[") or "," in spec:
        try:
            numbers = _read_list(spec.strip())
        except ValueError:
            raise ValueError(f"cannot read layers={spec!r}; write a list as '[0, 7, 11]'") from None
        return _checked_layers(numbers, num_teacher)
    name, _, count = (part.strip() for part in spec.partition(":"))
    if name not in STRATEGIES:
        options = [*(f"{strategy}:<n>" for strategy in STRATEGIES), "a list such as [0, 7, 11]"]
        raise unknown_name("layers", spec, options)
    if not count.isdecimal() or not 1 <= int(count) <= num_teacher:
        raise ValueError(
            f"layers={spec!r}: write '{name}:<n>', n from 1 to {num_teacher}, the teacher's blocks"
        )
    n = int(count)
    if name == "uniform":
        return uniform_blocks(n, num_teacher)
    return list(range(n)) if name == "first" else list(range(num_teacher - n, num_teacher))


def _read_list(text: str) -> list[int]:
    if text.startswith("["):
        if not text.endswith("]"):
            raise ValueError
        text = text[1:-1]
    return [int(part) for part in text.split(",")] if text.strip() else []


def _checked_layers(layers: Sequence[int], num_teacher: int) -> list[int]:
    listed = isinstance(layers, Sequence) and not isinstance(layers, bytes)
    # Integral, as the numbers of np.linspace(...).astype(int) are none of Python's.
    if not listed or any(isinstance(i, bool) or not isinstance(i, Integral) for i in layers):
        raise TypeError(
            f"layers must be text such as 'uniform:3' or a list of block numbers, got {layers!r}"
        )
    layers = [int(layer) for layer in layers]
    if not layers:
        raise ValueError("layers is empty: a student needs at least one block")
    outside = [layer for layer in layers if not 0 <= layer < num_teacher]
    if outside:
        raise ValueError(
            f"layers={layers}: the teacher has no block {outside[0]}, its blocks are "
            f"0..{num_teacher - 1} (numbers are 0-based: [3, 7, 11] are the 4th, 8th and 12th)"
        )
    if any(a >= b for a, b in pairwise(layers)):
        raise ValueError(f"layers={layers} must be strictly increasing, each block at most once")
    return layers


def _check_weights(model: nn.Module) -> None:
    """Refuse a teacher whose weights are not numbers that can be copied and cut."""
    weights = _weights(model)
    unloaded = [n for n, weight in weights.items() if getattr(weight, "is_meta", False)]
    if unloaded:
        raise encoders.not_loaded(unloaded[0])
    if any(type(weight).__name__ == "DTensor" for weight in weights.values()):
        raise UnsupportedEncoderError(
            "the teacher's weights are sharded over processes: make the student before fully_shard"
        )
    adapted = [name for name in weights if ".base_layer." in name]
    if adapted:
        raise UnsupportedEncoderError(
            f"the teacher has PEFT adapters, e.g. beside {adapted[0]!r}, which a student does not take over: merge "
            "them into its weights with PEFT's merge_and_unload"
        )
    # PyTorch's own packed weights are no tensors in the state dict, others' are integers.
    packed = not all(isinstance(weight, Tensor) for weight in weights.values())
    if packed or not all(p.is_floating_point() for p in model.parameters()):
        raise UnsupportedEncoderError(
            "the teacher is quantised, and packed weights cannot be cut: load it in float32, "
            "float16 or bfloat16"
        )


def _shorter_config(config: PretrainedConfig, spec: EncoderSpec, kept: list[int]) -> Any:
    groups = getattr(config, "num_hidden_groups", 1)
    wanted = [layer * groups // spec.num_blocks for layer in kept]
    if wanted != [i * groups // len(kept) for i in range(len(kept))]:
        raise ValueError(
            f"layers={kept}: this teacher shares its blocks in {groups} groups, and a model of "
            f"{len(kept)} blocks cannot run groups {wanted}; take equally many blocks of each group"
        )
    config = copy.deepcopy(config)
    setattr(config, encoders.depth_field(config), len(kept))
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[layer] for layer in kept]
    config.name_or_path = ""
    return config


def _relabel(config: Any, num_labels: int, *, has_head: bool, copy_head: bool) -> None:
    if not has_head:
        raise ValueError(
            "num_labels needs a teacher with a task head, this one is a bare encoder: load it "
            "with AutoModelForSequenceClassification"
        )
    num_labels = whole_number("num_labels", num_labels, least=1)
    if num_labels == config.num_labels:
        return
    if copy_head:
        raise ValueError(
            f"copy_head=True keeps the teacher's {config.num_labels} labels, got "
            f"num_labels={num_labels}: leave out one of them"
        )
    config.num_labels = num_labels
    # Transformers infers it from the labels; the teacher's may not suit this many.
    config.problem_type = None


@torch.no_grad()
def _fill_base(teacher: nn.Module, student: nn.Module, kept: list[int]) -> list[tuple[str, str]]:
    """Copy the bare encoder; returns what each part of the student was made of."""
    cut = Slicer(encoders.describe(teacher), encoders.describe(student))
    sources = _weights(teacher)
    teacher_blocks = _block_names(teacher)
    origin = dict(zip(_block_names(student), [teacher_blocks[i] for i in kept], strict=True))
    unused = {n for n in sources if n.startswith(tuple(f"{block}." for block in origin.values()))}
    others: dict[str, str] = {}
    for name, target in student.state_dict().items():
        block = next((prefix for prefix in origin if name.startswith(f"{prefix}.")), None)
        source = name if block is None else origin[block] + name.removeprefix(block)
        if source not in sources:
            raise UnsupportedEncoderError(f"the teacher has no weight {source!r} to copy")
        target.copy_(cut(name, sources[source], target.shape))
        unused.discard(source)
        if block is None:
            part = name.split(".")[0]
            others[part] = part

    rows = list(others.items())
    if len(origin) < len(kept):
        return [*rows, (f"blocks 0..{len(kept) - 1}", "the shared block")]
    for i, layer in enumerate(kept):
        lost = sorted(n for n in unused if n.startswith(f"{teacher_blocks[layer]}."))
        without = "".join(f", without {n.removeprefix(teacher_blocks[layer])[1:]}" for n in lost)
        rows.append((f"block {i}", f"block {layer}{without}"))
    return rows


@torch.no_grad()
def _fill_head(
    teacher: nn.Module, student: nn.Module, copy_head: bool, seed: int
) -> list[tuple[str, str]]:
    """Copy the task head, or leave it as it was drawn."""
    base = encoders.base_model(student)
    prefix = next(name for name, module in student.named_modules() if module is base)
    if not prefix:
        return []
    cut = Slicer(encoders.describe(teacher), encoders.describe(student))
    sources = _weights(teacher)
    tied = {weight.data_ptr() for weight in base.state_dict().values()}
    rows: dict[tuple[str, str], None] = {}
    for name, target in student.state_dict().items():
        if name.startswith(f"{prefix}."):
            continue
        part = name.split(".")[0]
        if target.data_ptr() in tied:
            rows[name, "tied to the embeddings"] = None
        elif copy_head:
            target.copy_(cut(name, sources[name], target.shape))
            rows[part, part] = None
        else:
            rows[part, f"new (seed {seed})"] = None
    return list(rows)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without the name torch.compile puts in between."""
    return {name.replace("_orig_mod.", ""): t for name, t in model.state_dict().items()}


def _block_names(base: nn.Module) -> list[str]:
    names = {id(module): name for name, module in base.named_modules()}
    return [names[id(block)].replace("_orig_mod.", "") for block in encoders.block_list(base)]


def _table(student: PreTrainedModel, teacher: EncoderSpec, rows: list[tuple[str, str]]) -> str:
    spec = encoders.describe(student)
    width = max(len(part) for part, _ in rows)
    lines = [
        f"student: {type(student).__name__}, {spec.num_blocks} of {teacher.num_blocks} blocks, "
        f"hidden size {spec.hidden_size} of {teacher.hidden_size}, "
        f"{spec.num_heads} heads of width {spec.head_dim}, "
        f"{sum(p.numel() for p in student.parameters()):,} parameters in "
        f"{str(student.dtype).removeprefix('torch.')}"
    ]
    return "\n".join(lines + [f"  {part:<{width}} <- {source}" for part, source in rows])
