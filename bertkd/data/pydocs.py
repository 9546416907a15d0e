"""Tasks on docstrings: real text and honest questions on a machine without data or network."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bertkd.data.doc_splits import digest, group_of, split_by_module
from bertkd.data.docstring_cache import read_docstrings
from bertkd.data.docstrings import Docstring, text_key
from bertkd.data.tables import RawTask, Table
from bertkd.errors import unknown_name

PYDOCS_TASKS = ("pydocs-topic", "pydocs-match")
MIN_PER_TOPIC = 50
MAX_WORDS = 64
_HIDDEN = "package"


@dataclass(frozen=True)
class RetrievalData:
    """Find a function's docstring among held-out ones from its name and signature.

    Attributes:
        train_texts: unlabelled texts of the training modules: docstrings and signatures.
        queries: ``"Message.get_param(param, header='content-type')"``, from held-out modules.
        documents: ``documents[i]`` is the answer to ``queries[i]``; both are free of duplicates.
    """

    train_texts: list[str]
    queries: list[str]
    documents: list[str]


def pydocs_task(
    name: str,
    sources: Sequence[str] = ("stdlib",),
    cache_dir: str | os.PathLike[str] | None = None,
) -> RawTask:
    """Build ``"pydocs-topic"`` or ``"pydocs-match"`` from docstrings; same data in every process.

    *Topic*: which package does this docstring belong to? The classes are the groups (``group_of``)
    with at least 50 docstrings. Their names, and dotted paths that begin with them, read
    ``package`` in all texts, whatever the answer, so that they neither give it away nor rule others
    out.

    *Match*: does this docstring describe this signature? Each function comes once with its own
    signature and once with another's from the same side of the split: from the same group for half
    of them, from a different group for the others. Every signature is right as often as wrong.

    Splits are by module, see ``split_by_module``. Texts end after 64 words.

    Raises:
        ValueError: unknown task or source.
        ModuleNotFoundError: a source is not installed.
    """
    if name not in PYDOCS_TASKS:
        raise unknown_name("pydocs task", name, PYDOCS_TASKS)
    records = _records(sources, cache_dir)
    if match := name == "pydocs-match":
        splits = {split: _pairs(part) for split, part in _functions(records).items()}
        names: tuple[str, ...] = ("another", "described")
    else:
        splits, names = _topics(records)
    return RawTask(
        name=name,
        tables={split: _table(f"{name} {split}", rows) for split, rows in splits.items()},
        text_column="text",
        pair_column="signature" if match else None,
        label_column="label",
        regression=False,
        label_names=names,
        metrics=("accuracy", "f1" if match else "macro_f1"),
        cut_by_design=True,
    )


def load_retrieval(
    *,
    split: str = "validation",
    sources: Sequence[str] = ("stdlib",),
    max_queries: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> RetrievalData:
    """Build ``pydocs-retrieval``: about a thousand queries on held-out modules for each split.

    Args:
        split: ``"validation"`` or ``"test"``, which share no unit of code (``split_by_module``).
        sources: see ``read_docstrings``.
        max_queries: keep only so many, chosen by hash; fewer documents make an easier task.
        cache_dir: see ``read_docstrings``.

    Raises:
        ValueError: unknown split or source, or ``max_queries`` below 2.
    """
    if split not in ("validation", "test"):
        raise unknown_name("retrieval split", split, ("validation", "test"))
    if max_queries is not None and max_queries < 2:
        raise ValueError(f"max_queries must be at least 2, got {max_queries}")
    records = _records(sources, cache_dir)
    functions = _functions(records)
    train_texts = [_text(record.text) for record in split_by_module(records)["train"]]
    train_texts += [_signature(record) for record in functions["train"]]
    # "main()" has many docstrings; as a query it gets the first.
    answers: dict[str, str] = {}
    for record in functions[split]:
        answers.setdefault(_signature(record), _text(record.text))
    queries = sorted(answers, key=digest)[:max_queries]
    return RetrievalData(
        train_texts=list(dict.fromkeys(train_texts)),
        queries=queries,
        documents=[answers[query] for query in queries],
    )


def _records(sources: Sequence[str], cache_dir: str | os.PathLike[str] | None) -> list[Docstring]:
    # Unique in what the tasks read of them: texts that differ only after MAX_WORDS would leak.
    kept: dict[str, Docstring] = {}
    for record in read_docstrings(sources, cache_dir=cache_dir):
        kept.setdefault(text_key(_text(record.text)), record)
    return list(kept.values())


def _functions(records: Iterable[Docstring]) -> dict[str, list[Docstring]]:
    return {
        split: [record for record in part if record.kind == "function"]
        for split, part in split_by_module(records).items()
    }


def _text(docstring: str) -> str:
    return " ".join(docstring.split()[:MAX_WORDS])


def _signature(record: Docstring) -> str:
    return record.qualname + record.signature


def _topics(
    records: Sequence[Docstring],
) -> tuple[dict[str, list[dict[str, object]]], tuple[str, ...]]:
    sizes = Counter(map(group_of, records))
    names = sorted(name for name, size in sizes.items() if size >= MIN_PER_TOPIC)
    if len(names) < 2:
        raise ValueError(f"fewer than two packages have {MIN_PER_TOPIC} docstrings: add sources")
    label = {name: i for i, name in enumerate(names)}
    hide = _hider(names)
    splits: dict[str, list[dict[str, object]]] = {}
    seen: set[str] = set()
    for split, part in split_by_module(
        record for record in records if group_of(record) in label
    ).items():
        splits[split] = []
        for record in part:
            text = _text(hide(record.text))
            # Without the names more texts are the same.
            if (key := text_key(text)) not in seen:
                seen.add(key)
                splits[split].append({"text": text, "label": label[group_of(record)]})
    return splits, tuple(names)


def _hider(names: Sequence[str]) -> Callable[[str], str]:
    # "torch" must go where "torch.nn" is a topic; longest first, or "http" would eat "httpx".
    hidden = {*names, *(name.split(".")[0] for name in names)}
    words = "|".join(re.escape(name) for name in sorted(hidden, key=len, reverse=True))
    pattern = re.compile(rf"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])(?:\.\w+)*", re.IGNORECASE)
    return lambda text: pattern.sub(_HIDDEN, text)


def _pairs(functions: Sequence[Docstring]) -> list[dict[str, object]]:
    functions = sorted(functions, key=lambda record: digest(f"{record.module}:{record.qualname}"))
    near: dict[str, list[Docstring]] = defaultdict(list)
    far: list[Docstring] = []
    for i, record in enumerate(functions):
        if i % 2:
            far.append(record)
        else:
            near[group_of(record)].append(record)
    rows: list[tuple[Docstring, Docstring]] = []
    for members in near.values():
        if len(members) == 1:
            far += members
        else:
            rows += zip(members, [*members[1:], members[0]], strict=True)
    # Sorted by group and turned by the largest group's size, no function meets one of its own group.
    far.sort(key=group_of)
    turn = max(Counter(map(group_of, far)).values(), default=0)
    rows += zip(far, [*far[turn:], *far[:turn]], strict=True)
    examples = []
    for record, other in rows:
        if _signature(record) == _signature(other):
            continue
        for label, owner in ((1, record), (0, other)):
            examples.append(
                {"text": _text(record.text), "signature": _signature(owner), "label": label}
            )
    return sorted(examples, key=lambda row: digest(f"{row['text']}|{row['signature']}"))


def _table(name: str, rows: Sequence[dict[str, object]]) -> Table:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return Table(columns, ((name, len(rows)),))
