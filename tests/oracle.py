"""Independent definitions in float64 numpy, one row at a time: what the reference itself is held to."""

import numpy as np
import torch


def _float64(x):
    return x.detach().to(torch.float64).numpy()


def _softmax(row):
    exponentials = np.exp(row - row.max())
    return exponentials / exponentials.sum()


def _attended(mask, b, i, length, window):
    """Positions of the real keys of sequence b that are at most ``window`` tokens from i."""
    keys = np.arange(length) if mask is None else np.flatnonzero(mask[b].numpy())
    return keys if window is None else keys[np.abs(keys - i) <= window]


def relation_kl(a_s, b_s, a_t, b_t, mask, scale_s, scale_t, window=None):
    """(B, H, L) by a loop over rows and the keys that they attend to only."""
    a_s, b_s, a_t, b_t = (_float64(x) for x in (a_s, b_s, a_t, b_t))
    out = np.zeros(a_s.shape[:3])
    for b, h, i in np.ndindex(*out.shape):
        keys = _attended(mask, b, i, a_s.shape[2], window)
        if len(keys) == 0:
            continue
        p_s = _softmax(b_s[b, h, keys] @ a_s[b, h, i] * scale_s)
        p_t = _softmax(b_t[b, h, keys] @ a_t[b, h, i] * scale_t)
        out[b, h, i] = (p_t * np.log(p_t / p_s)).sum()
    return out


def attention_mse(q_s, k_s, q_t, k_t, mask, scale_s, scale_t, window=None):
    """Sums over real keys, (B, H, L), by a loop over rows."""
    q_s, k_s, q_t, k_t = (_float64(x) for x in (q_s, k_s, q_t, k_t))
    out = np.zeros(q_s.shape[:3])
    for b, h, i in np.ndindex(*out.shape):
        keys = _attended(mask, b, i, q_s.shape[2], window)
        student = k_s[b, h, keys] @ q_s[b, h, i] * scale_s
        teacher = k_t[b, h, keys] @ q_t[b, h, i] * scale_t
        out[b, h, i] = ((student - teacher) ** 2).sum()
    return out


def relative(actual, expected):
    """Norm of the error over the norm of what is expected (or the error itself, where that is 0)."""
    error = (actual.double() - expected.double()).norm().item()
    size = expected.double().norm().item()
    return error / size if size > 0 else error
