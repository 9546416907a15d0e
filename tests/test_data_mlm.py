"""Pretraining text: blocks, their order when resumed, and masking."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_tokenizer import tiny_tokenizer

from bertkd.data import Corpus, MaskingCollator, TextBlocks, load_blocks, open_corpus

WORDS = ["cat", "dog", "bird", "fish", "tree", "house", "film", "plot"]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr("bertkd.data.blocks._CHUNK", 100)


def some_texts(count=230):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)]


def test_blocks_are_all_of_the_text_once(tokenizer):
    texts = some_texts()
    blocks = list(TextBlocks(texts, tokenizer, 16, epochs=1))
    assert {len(block["input_ids"]) for block in blocks} == {16}
    assert [block["index"] for block in blocks] == list(range(len(blocks)))
    assert all(block["input_ids"][0] == tokenizer.cls_token_id for block in blocks)
    assert all(block["input_ids"][-1] == tokenizer.sep_token_id for block in blocks)
    joined = [token for block in blocks for token in block["input_ids"][1:-1]]
    parts = tokenizer.decode(joined).split(" [SEP]")
    # the last text may be cut, the others are there in another order
    assert len(texts) - len(parts) < 16
    remaining = list(texts)
    for part in parts[:-1]:
        remaining.remove(part.strip())
    assert [part.strip() for part in parts[: len(parts) - 1]] != texts[: len(parts) - 1]


def test_order_depends_on_seed_and_epoch(tokenizer):
    def blocks(**options):
        stream = TextBlocks(some_texts(), tokenizer, 16, **options)
        return [block["input_ids"] for block in itertools.islice(stream, 50)]

    assert blocks() == blocks()
    assert blocks(seed=1) != blocks()
    two = TextBlocks(some_texts(), tokenizer, 16, epochs=2)
    joined = [token for block in two for token in block["input_ids"][1:-1]]
    texts = [text.strip() for text in tokenizer.decode(joined).split("[SEP]")]
    assert sorted(texts[:230]) == sorted(some_texts())
    assert texts[:200] != texts[230:430]


@pytest.mark.parametrize("stop", [0, 1, 30, 44, 45, 70, 200])
def test_resumed_stream_gives_the_blocks_it_would_have_given(tokenizer, stop):
    def make():
        return TextBlocks(some_texts(), tokenizer, 16)

    whole = list(itertools.islice(make(), 250))
    first = make()
    seen = list(itertools.islice(first, stop))
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert seen + list(itertools.islice(resumed, 250 - stop)) == whole


def test_resuming_tokenises_no_more_than_a_chunk(tokenizer):
    first = TextBlocks(some_texts(), tokenizer, 16)
    list(itertools.islice(first, 130))
    resumed = TextBlocks(some_texts(), tokenizer, 16)
    resumed.load_state_dict(first.state_dict())
    calls = []
    make_tokens = resumed._tokens
    resumed._tokens = lambda texts, *where: calls.append(len(texts)) or make_tokens(texts, *where)
    next(iter(resumed))
    assert calls in ([100], [30])


def test_ranks_share_the_blocks(tokenizer):
    whole = list(itertools.islice(TextBlocks(some_texts(), tokenizer, 16), 90))
    parts = [
        list(itertools.islice(TextBlocks(some_texts(), tokenizer, 16, rank=r, world_size=3), 30))
        for r in range(3)
    ]
    assert [block for step in zip(*parts, strict=True) for block in step] == whole


def test_state_of_another_stream_is_refused(tokenizer):
    state = TextBlocks(some_texts(), tokenizer, 16).state_dict()
    for other in (
        TextBlocks(some_texts(), tokenizer, 32),
        TextBlocks(some_texts(), tokenizer, 16, seed=1),
        TextBlocks(some_texts(30), tokenizer, 16),
        TextBlocks(some_texts(), tokenizer, 16, world_size=2),
    ):
        with pytest.raises(ValueError, match="another run"):
            other.load_state_dict(state)


def test_too_little_text(tokenizer):
    with pytest.raises(ValueError, match="a list of 2 texts is empty"):
        next(iter(TextBlocks(["", "  "], tokenizer, 16)))
    with pytest.raises(ValueError, match="has 3 tokens, less than one block of 14"):
        next(iter(TextBlocks(["cat dog"], tokenizer, 16)))
    with pytest.raises(ValueError, match="no room for text"):
        TextBlocks(["cat"], tokenizer, 2)
    with pytest.raises(ValueError, match="rank must be"):
        TextBlocks(["cat"], tokenizer, 16, rank=1)
    with pytest.raises(TypeError, match="not one text"):
        TextBlocks("a file name perhaps", tokenizer, 16)


def test_several_workers_are_refused(tokenizer, monkeypatch):
    worker = SimpleNamespace(id=0, num_workers=2)
    monkeypatch.setattr("bertkd.data.blocks.get_worker_info", lambda: worker)
    with pytest.raises(ValueError, match="num_workers=0 or 1"):
        next(iter(TextBlocks(some_texts(), tokenizer, 16)))


def test_load_blocks_is_the_stream_in_memory(tokenizer):
    rows = load_blocks(some_texts(), tokenizer, 16, seed=2, limit=50)
    stream = TextBlocks(some_texts(), tokenizer, 16, seed=2)
    assert list(rows) == list(itertools.islice(stream, 50))
    assert len(load_blocks(some_texts(), tokenizer, 16)) > 50


# Corpora


def test_files_give_one_text_per_line(tmp_path):
    (tmp_path / "b.txt").write_text("three\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("one\n\n  two  \n", encoding="utf-8")
    (tmp_path / "notes.md").write_text("no\n")
    corpus = open_corpus(tmp_path)
    assert list(corpus.texts()) == list(corpus.texts()) == ["one", "two", "three"]
    assert list(open_corpus(tmp_path / "b.txt").texts()) == ["three"]


def test_missing_corpora(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        open_corpus(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"has no \.txt files"):
        open_corpus(tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no \.txt files"):
        open_corpus(tmp_path)


def test_what_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: .* this is a table"):
        open_corpus(tmp_path / "a.jsonl")
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        list(open_corpus(tmp_path).texts())
    with pytest.raises(ValueError, match="a list of 2 texts: text 2 is None, not a text"):
        list(Corpus.of_texts(["good", None]).texts())


def test_hub_corpus_is_streamed(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, config, **options):
        asked.append((path, config, options))
        rows = datasets.Dataset.from_dict({"body": ["one", "two"], "id": [0, 1]})
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    corpus = open_corpus("hub:owner/name:config", text_column="body")
    assert asked == [("owner/name", "config", {"split": "train", "streaming": True})]
    assert list(corpus.texts()) == list(corpus.texts()) == ["one", "two"]
    with pytest.raises(ValueError, match="text_column='text': hub:owner/name has no such column"):
        open_corpus("hub:owner/name")
    with pytest.raises(ValueError, match="corpus hub:: name a data set of the hub"):
        open_corpus("hub:")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {}["offline"])
    with pytest.raises(
        OSError, match=r"cannot load owner/name from the hub \(KeyError: 'offline'\)"
    ):
        open_corpus("hub:owner/name")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        open_corpus("hub:owner/name")


# Masking


def rows_of(tokenizer, count=64):
    return list(load_blocks(some_texts(2300), tokenizer, 64, limit=count))


def test_masking_shares_and_labels(tokenizer):
    rows = rows_of(tokenizer)
    torch.manual_seed(0)
    batch = MaskingCollator(tokenizer)(rows)
    original = torch.tensor([row["input_ids"] for row in rows])
    chosen = batch["labels"] != -100
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()
    assert torch.equal(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    assert chosen.sum() / (~special).sum() == pytest.approx(0.15, abs=0.02)
    now, before = batch["input_ids"][chosen], original[chosen]
    masked = now == tokenizer.mask_token_id
    assert masked.float().mean() == pytest.approx(0.8, abs=0.06)
    assert (now == before).float().mean() == pytest.approx(0.1, abs=0.05)
    assert batch["index"].tolist() == list(range(64))
    assert batch["attention_mask"].all()


def test_masking_is_dynamic_and_follows_the_global_generator(tokenizer):
    rows, collate = rows_of(tokenizer, 8), MaskingCollator(tokenizer)
    torch.manual_seed(0)
    first, second = collate(rows), collate(rows)
    assert not torch.equal(first["labels"], second["labels"])
    torch.manual_seed(0)
    again = collate(rows)
    assert torch.equal(first["labels"], again["labels"])
    assert torch.equal(first["input_ids"], again["input_ids"])


def test_seeded_masking_is_a_function_of_the_batch(tokenizer):
    rows = rows_of(tokenizer, 8)
    first = MaskingCollator(tokenizer, seed=1)
    before = torch.get_rng_state()
    batches = [first(rows), first(rows), MaskingCollator(tokenizer, seed=1)(rows)]
    assert torch.equal(torch.get_rng_state(), before)
    for batch in batches[1:]:
        assert torch.equal(batch["labels"], batches[0]["labels"])
        assert torch.equal(batch["input_ids"], batches[0]["input_ids"])
    assert not torch.equal(MaskingCollator(tokenizer, seed=2)(rows)["labels"], batches[0]["labels"])
    assert not torch.equal(first(rows[4:])["labels"], batches[0]["labels"][4:])


def test_padding_is_never_masked_and_something_always_is(tokenizer):
    rows = [{"input_ids": tokenizer("cat")["input_ids"]}, {"input_ids": [2, 3]}]
    collate = MaskingCollator(tokenizer, 0.05)
    torch.manual_seed(0)
    for _ in range(20):
        labels = collate(rows)["labels"]
        assert (labels != -100).nonzero().tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="nothing but special tokens"):
        collate(rows[1:])


def test_masking_refuses(tokenizer):
    with pytest.raises(ValueError, match=r"probability must lie in \(0, 1\], got 0"):
        MaskingCollator(tokenizer, 0)
    without = tiny_tokenizer()
    without.mask_token = None
    with pytest.raises(ValueError, match="mask token"):
        MaskingCollator(without)


def test_corpus_of_texts_is_named_by_its_size():
    assert Corpus.of_texts(["a"]).name == "a list of 1 texts"
