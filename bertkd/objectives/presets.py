"""Objectives that go by a name: the paper's nine and those of related methods.

A weight means nothing without its reduction and temperature factor, so each preset writes all of
them out. Sources quote what was read in the authors' code; "recalled" marks what was not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bertkd.errors import unknown_name
from bertkd.objectives.expression import Expression, TermSpec, distinct_names, parse, syntax_error

PAPER = "Wang et al., ACL 2023, 'How to Distill your BERT'"
_ANY = (
    "teacher blocks 'first:N', 'uniform:N' or 'last:N'; the paper finds attention terms indifferent"
)
_LOW = "teacher blocks 'first:N': kd and hidden terms lose much with higher ones"


@dataclass(frozen=True)
class Preset:
    """A named objective.

    Attributes:
        name: what users write; the paper's combinations are listed under their own text.
        objective: what it expands to.
        source: where its terms, weights and reductions were read.
        initialisation: what to give `create_student`, and why.
        layer_map: the map recommended for terms that name none.
        note: what the method adds beside its loss.
        released: what ``name@released`` expands to; empty where the paper's code has no such method.
    """

    name: str
    objective: str
    source: str
    initialisation: str
    layer_map: str = "uniform"
    note: str = ""
    released: str = ""


_ALL = (
    Preset(
        "kd", "kd", PAPER, _LOW, note="second stage of the paper's two; vanilla_kd is one stage"
    ),
    Preset(
        "vanilla_kd",
        "0.5*ce + 0.5*kd(temperature=2.0, t_squared=True)",
        f"{PAPER}, released code for its KD baseline",
        _LOW,
        note="labels and logits in one stage",
        released="0.5*ce + 0.5*kd@released",
    ),
    Preset(
        "hid_cls_contrast",
        "hid_cls_contrast",
        f"{PAPER}; Tian et al., ICLR 2020 (CRD)",
        _LOW,
        note="needs num_examples and batch['index'] (mode='bank')",
    ),
    Preset("hid_cls", "hid_cls(map='skip')", PAPER, _LOW, "skip"),
    Preset("hid_seq", "hid_seq(map='skip')", PAPER, _LOW, "skip"),
    Preset("att_mse", "att_mse", PAPER, _ANY),
    Preset("att_mse + hid_seq", "att_mse + hid_seq(map='skip')", PAPER, _ANY),
    Preset("att_kl", "att_kl", PAPER, _ANY),
    Preset("att_kl + hid_seq", "att_kl + hid_seq(map='skip')", PAPER, _ANY),
    Preset(
        "att_kl + val_kl", "att_kl + val_kl", PAPER, _ANY, note="its best task-specific average"
    ),
    Preset(
        "distilbert",
        "5.0*kd(temperature=2.0, t_squared=True, all_tokens=True) + 2.0*ce + hid_cos(map='last')",
        "Sanh et al. 2019; transformers' distillation example, whose kd is over all real tokens",
        "teacher blocks [0, 2, 4, 7, 9, 11] of 12, embeddings and head",
        note="masked-language-model heads on both sides; labels -100 except at masked tokens",
    ),
    Preset(
        "patient_kd",
        "0.5*ce + 0.5*kd(temperature=10.0, t_squared=True) + 0.13*pkd(map='skip', reduction='mean')",
        "Sun et al., EMNLP 2019 (PKD), code: T 10, alpha 0.5 and beta 100, as it has them for MNLI and SST-2",
        "teacher blocks 'first:N' (recalled)",
        "skip",
        note="its beta weighs a mean over channels too: 100 / 768 for base models; its kd one over classes",
    ),
    Preset(
        "pkd",
        "pkd(map='skip', reduction='mean')",
        "Sun et al., EMNLP 2019: its intermediate term alone, see patient_kd for the whole",
        "teacher blocks 'first:N' (recalled)",
        "skip",
    ),
    Preset(
        "tinybert",
        "att_mse(map='uniform') + hid_seq(map='skip', shared=True)",
        "Jiao et al. 2020; official code: scores before softmax, embedding layer included, one W",
        "a general distilled student; random otherwise",
        note="first stage; a second one does kd(t_squared=False) alone",
        released="att_mse@released + hid_seq@released",
    ),
    Preset(
        "mobilebert",
        "hid_seq(map='uniform') + att_kl(map='uniform')",
        "Sun et al. 2020 (recalled): feature map and attention transfer at every layer",
        "random; as deep and as wide between blocks as the teacher",
        note="one stage per layer in the original; then 0.5*ce + 0.5*kd on masked tokens",
    ),
    Preset(
        "minilm",
        "att_kl(map='last') + val_kl(map='last')",
        "Wang et al., NeurIPS 2020: attention and value relation of the last block",
        "random in the original",
        "last",
        released="att_kl@released + val_kl@released",
    ),
    Preset(
        "minilmv2",
        "qkv_kl",
        "Wang et al., ACL Findings 2021: q-q, k-k and v-v relations, last student block",
        "random in the original",
        "last",
        note="teacher_block: the last for base, an upper-middle one (20 of 0..23) for large",
        released="qkv_kl@released",
    ),
    Preset(
        "alp_kd",
        "0.5*ce + 0.5*kd(temperature=1.0, t_squared=True) + alp",
        "Passban et al., AAAI 2021 (weights recalled)",
        _LOW,
        released="alp@released",
    ),
    Preset(
        "pearson",
        "att_pearson(map='last')",
        f"{PAPER}, released code ('pear_col'), last block",
        _ANY,
        "last",
        released="att_pearson@released",
    ),
)

PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def expand(text: str, terms: tuple[str, ...]) -> Expression:
    """Read an objective and put every preset's terms in its place.

    A preset multiplies its terms by the weight before it. A name that is both a term and a preset is
    the term; its preset only records the recommended options.

    Args:
        text: the objective.
        terms: names of the known terms.

    Raises:
        ValueError: unreadable text, an unknown name (the nearest is suggested), options given to a
            preset, or ``@released`` where the paper's code has no such method.
    """
    expanded: list[TermSpec] = []
    for spec in parse(text).terms:
        if spec.kind in terms:
            expanded.append(spec)
            continue
        preset = PRESETS.get(spec.kind)
        if preset is None:
            names = {*terms, *(name for name in PRESETS if name.isidentifier())}
            message = str(unknown_name("term", spec.kind, names))
            raise syntax_error(message, spec.text, spec.position)
        if spec.options:
            message = f"preset {spec.kind} takes no options; write its terms: {preset.objective}"
            raise syntax_error(message, spec.text, spec.position)
        if spec.released and not preset.released:
            message = f"preset {spec.kind} has no @released variant"
            raise syntax_error(message, spec.text, spec.position)
        inner = parse(preset.released if spec.released else preset.objective)
        expanded += [replace(term, weight=spec.weight * term.weight) for term in inner.terms]
    return Expression(distinct_names(tuple(expanded)))
