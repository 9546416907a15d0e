"""One attention function in front of another: it shows each call to whoever listens to the module.

Hugging Face's encoders look their attention function up by the name in their config. Inside
``intercept`` that name leads to a function which calls the listeners set on the attention module
and hands on to the implementation that the config named before.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bertkd import cpu_attention
from bertkd.errors import UnsupportedEncoderError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# An attention module's listeners: a tuple of callables (query, key, value, kwargs) -> None.
LISTENERS = "_bertkd_attention_listeners"

# Plain concatenation, because transformers looks for "flash" inside the name.
_PREFIX = "bertkd-"
_PADDED = _PREFIX + "padded-"

# One lock a config, by its id: configs can be neither hashed nor copied with a lock inside.
_LOCKS: dict[int, threading.RLock] = {}
_LOCKS_LOCK = threading.Lock()


class _Here(threading.local):
    captures = False


# Whether this thread is one that captures.
_HERE = _Here()

# These do not look their own name up in the config; other implementations (flash) do.
_NAME_BLIND = ("eager", "sdpa", "flex_attention", cpu_attention.NAME)


@contextmanager
def intercept(
    config: PretrainedConfig, instead_of_sdpa: str | None, has_pads: bool
) -> Iterator[None]:
    """Let the models that hold ``config`` call the listeners of their attention modules.

    Nesting is fine; other threads wait, as listeners and config are the model's and not a thread's. A plain call
    of the model in another thread meanwhile gives what it always gives.
    The config is left as it was found, also after an exception.

    Args:
        config: of the models.
        instead_of_sdpa: the implementation that is handed on to where the config names SDPA.
        has_pads: the batch's mask holds zeros, so that making SDPA's mask of it need not look for them.
    """
    with lock_of(config):
        before, captured = config._attn_implementation, _HERE.captures
        name = before or "eager"
        if name == "sdpa" and instead_of_sdpa is not None:
            name = instead_of_sdpa
        if not name.startswith(_PREFIX):
            config._attn_implementation = _register(name, has_pads and name == "sdpa")
        _HERE.captures = True
        try:
            yield
        finally:
            _HERE.captures = captured
            config._attn_implementation = before


def lock_of(config: PretrainedConfig) -> threading.RLock:
    """The lock of those who listen to the models that hold ``config``."""
    with _LOCKS_LOCK:
        if id(config) not in _LOCKS:
            weakref.finalize(config, _LOCKS.pop, id(config))
            _LOCKS[id(config)] = threading.RLock()
        return _LOCKS[id(config)]


def _register(name: str, has_pads: bool) -> str:
    """Register the interceptor of implementation ``name`` and return the interceptor's name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == cpu_attention.NAME:
        # A model that was unpickled may name it in a process where nobody has registered it yet.
        cpu_attention.register()
    ours = (_PADDED if has_pads else _PREFIX) + name
    implementation = ALL_ATTENTION_FUNCTIONS.get(name)
    if implementation is None and name != "eager":
        raise ValueError(
            f"the model's attention implementation {name!r} is not registered with transformers. "
            'Load the model with attn_implementation="sdpa".'
        )
    ALL_ATTENTION_FUNCTIONS.register(ours, _interceptor(name, implementation))
    mask_function = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    # Without one, transformers makes no mask: that is how some implementations want it.
    if mask_function is not None:
        if has_pads:
            mask_function = _mask_of_pads(mask_function)
        elif name == cpu_attention.NAME:
            mask_function = _mask_for_either
        ALL_MASK_ATTENTION_FUNCTIONS.register(ours, mask_function)
    return ours


@functools.cache
def _mask_of_pads(mask_function: Callable) -> Callable:
    """A mask function that does not look whether there are pads: on a GPU the host would wait for the answer."""

    def mask_of_pads(*args: Any, **kwargs: Any) -> Any:
        return mask_function(*args, **kwargs | {"allow_is_bidirectional_skip": False})

    return mask_of_pads


def _mask_for_either(*args: Any, **kwargs: Any) -> Any:
    """The mask of bertkd's kernel; in a thread that does not capture one that SDPA takes too.

    There the capture may be over, and the model be back on SDPA, before the mask is used.
    """
    if torch.compiler.is_compiling() or _HERE.captures:
        return cpu_attention.make_mask(*args, **kwargs)
    return _mask_of_pads(cpu_attention.make_mask)(*args, **kwargs)


# Cached, so that a compiled graph meets the function again that it was traced with.
@functools.cache
def _interceptor(name: str, implementation: Callable | None) -> Callable:
    def intercepted_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        for listener in getattr(module, LISTENERS, ()):
            listener(query, key, value, kwargs)
        attend = implementation or _eager_attention(module)
        if name in _NAME_BLIND:
            return attend(module, query, key, value, attention_mask, **kwargs)
        config: Any = module.config
        ours, config._attn_implementation = config._attn_implementation, name
        try:
            return attend(module, query, key, value, attention_mask, **kwargs)
        finally:
            config._attn_implementation = ours

    return intercepted_attention


def _eager_attention(module: nn.Module) -> Callable:
    """Find the eager attention of the file in which ``module`` is written: it is not registered."""
    attend = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if attend is None:
        raise UnsupportedEncoderError(
            f"no eager attention found for {type(module).__name__}. "
            'Load the model with attn_implementation="sdpa".'
        )
    return attend
