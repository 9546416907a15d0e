"""Padding examples to batches, and the order of the batches."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from torch.utils.data import DataLoader

from bertkd.data import Collator, LengthBucketSampler

TEXTS = ["the cat runs", "a dog", "the story was great and the plot was not"]


def examples(tokenizer, labels=(0, 1, 1)):
    return [
        {
            "input_ids": (encoded := tokenizer(text))["input_ids"],
            "token_type_ids": encoded["token_type_ids"],
            "labels": label,
            "index": 10 + i,
        }
        for i, (text, label) in enumerate(zip(TEXTS, labels, strict=True))
    ]


# Collator


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("step", [1, 8])
def test_padding_equals_the_tokenizers(side, step):
    tokenizer = tiny_tokenizer(padding_side=side)
    batch = Collator(tokenizer, step)(examples(tokenizer))
    expected = tokenizer(TEXTS, padding=True, pad_to_multiple_of=step, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert torch.equal(batch[name], expected[name]), name
        assert batch[name].dtype == torch.long
    assert batch["labels"].tolist() == [0, 1, 1]
    assert batch["labels"].dtype == torch.long
    assert batch["index"].tolist() == [10, 11, 12]


def test_token_types_are_padded_with_their_own_id():
    tokenizer = tiny_tokenizer()
    tokenizer._pad_token_type_id = 3
    assert Collator(tokenizer)(examples(tokenizer))["token_type_ids"][1, -1] == 3


def test_float_labels_stay_floats_also_where_they_are_whole():
    tokenizer = tiny_tokenizer()
    batch = Collator(tokenizer)(examples(tokenizer, (0.5, 1.0, 2.0)))
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [0.5, 1.0, 2.0]
    batch = Collator(tokenizer)(examples(tokenizer, [np.float64(1), np.float64(2), np.float64(3)]))
    assert batch["labels"].dtype == torch.float32


def test_given_attention_masks_are_kept_and_other_keys_left_out():
    tokenizer = tiny_tokenizer()
    rows = [{"input_ids": [2, 3], "attention_mask": [1, 0], "text": "a"}]
    batch = Collator(tokenizer, 4)(rows)
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0]]
    assert batch.keys() == {"input_ids", "attention_mask"}


def test_rounding_up_stops_at_the_models_length():
    tokenizer = tiny_tokenizer(model_max_length=13)
    batch = Collator(tokenizer)([{"input_ids": [5] * 12}])
    assert batch["input_ids"].shape == (1, 13)


def test_collator_refuses():
    tokenizer = tiny_tokenizer()
    collate = Collator(tokenizer)
    with pytest.raises(ValueError, match="no examples"):
        collate([])
    with pytest.raises(ValueError, match=r"different keys: index, input_ids \| input_ids"):
        collate([{"input_ids": [1], "index": 0}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1, got 0"):
        Collator(tokenizer, 0)
    with pytest.raises(TypeError, match=r"must be a whole number, got 8\.0"):
        Collator(tokenizer, 8.0)
    with pytest.raises(ValueError, match="an example has 3 input_ids, but 2 attention_mask"):
        collate([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}])
    with pytest.raises(ValueError, match=r"have 1, 2 labels each; .* DataCollatorForTokenClassif"):
        collate([{"input_ids": [1] * n, "labels": [0] * n} for n in (1, 2)])
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token: set tokenizer\.pad_token"):
        Collator(tokenizer)


# LengthBucketSampler


def some_lengths(rows, seed=0):
    return np.random.default_rng(seed).integers(3, 128, rows)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    batch_size=st.integers(1, 9),
    bucket_batches=st.integers(1, 5),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_an_epoch(rows, batch_size, bucket_batches, shuffle, epoch):
    sampler = LengthBucketSampler(
        some_lengths(rows), batch_size, shuffle=shuffle, bucket_batches=bucket_batches
    )
    batches = sampler.batches(epoch)
    assert len(batches) == len(sampler) == -(-rows // batch_size)
    assert sorted(row for batch in batches for row in batch) == list(range(rows))
    assert sorted(map(len, batches))[1:] == [batch_size] * (len(batches) - 1)


def test_batches_hold_similar_lengths_in_mixed_order():
    lengths = some_lengths(5000)
    sampler = LengthBucketSampler(lengths, 10)
    means = [lengths[batch].mean() for batch in sampler.batches(0)]
    padded = sum(len(batch) * lengths[batch].max() for batch in sampler.batches(0))
    assert padded < 1.05 * lengths.sum()
    # batches in sorted order would be as long as their neighbours
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2
    unsorted = LengthBucketSampler(lengths, 10, bucket_batches=1)
    assert sum(10 * lengths[batch].max() for batch in unsorted.batches(0)) > 1.5 * lengths.sum()


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed=0, epoch=0):
        np.random.seed(epoch)
        return LengthBucketSampler(some_lengths(100), 4, seed=seed).batches(epoch)

    assert order() == order()
    assert order(epoch=1) == order(epoch=1) != order()
    assert order(seed=1) != order()


def test_unshuffled_rows_keep_their_order():
    batches = LengthBucketSampler([9, 1, 5, 3, 7], 2, shuffle=False).batches(3)
    assert batches == [[0, 1], [2, 3], [4]]


def test_iterating_goes_from_epoch_to_epoch():
    sampler = LengthBucketSampler(some_lengths(10), 3)
    assert list(sampler) == sampler.batches(0)
    assert list(sampler) == sampler.batches(1)
    sampler.set_epoch(0)
    assert list(sampler) == sampler.batches(0)
    assert list(itertools.islice(sampler, 4)) == sampler.batches(1)
    assert list(sampler) == sampler.batches(2)


def test_dropped_rows_are_not_the_longest_ones():
    lengths = np.arange(100)
    dropped = []
    for epoch in range(40):
        batches = LengthBucketSampler(lengths, 9, drop_last=True).batches(epoch)
        assert {len(batch) for batch in batches} == {9}
        dropped += set(range(100)) - {row for batch in batches for row in batch}
    assert len(dropped) == 40
    assert 30 < np.mean(dropped) < 70


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 200),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_ranks_together_make_the_joint_batch(rows, batch_size, world_size, drop_last, shuffle):
    options = {"drop_last": drop_last, "shuffle": shuffle}
    joint_size = batch_size * world_size
    least = joint_size if drop_last else world_size
    if rows < least:
        with pytest.raises(ValueError, match="rows make no batch"):
            LengthBucketSampler(some_lengths(rows), batch_size, world_size=world_size, **options)
        return
    joint = LengthBucketSampler(some_lengths(rows), joint_size, **options).batches(2)
    ranks = [
        LengthBucketSampler(
            some_lengths(rows), batch_size, rank=rank, world_size=world_size, **options
        )
        for rank in range(world_size)
    ]
    counts = {len(rank.batches(2)) for rank in ranks} | {len(rank) for rank in ranks}
    assert len(counts) == 1
    if rows % joint_size < world_size and not drop_last and rows % joint_size:
        # too few rows for all ranks: that batch is in the single process only
        assert counts == {len(joint) - 1}
        return
    assert counts == {len(joint)}
    for parts, whole in zip(
        zip(*(rank.batches(2) for rank in ranks), strict=True), joint, strict=True
    ):
        assert sorted(row for part in parts for row in part) == sorted(whole)
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) > 0


@pytest.mark.parametrize("stop", [0, 1, 7, 24, 25, 26, 40])
def test_resumed_run_sees_the_batches_it_would_have_seen(stop):
    def make():
        return LengthBucketSampler(some_lengths(100), 4, seed=3)

    def endless(sampler):
        while True:
            yield from sampler

    run = endless(make())
    whole = [next(run) for _ in range(60)]
    first = make()
    run = endless(first)
    seen = [next(run) for _ in range(stop)]
    state = json.loads(json.dumps(first.state_dict()))
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(state["epoch"])  # as a loop over epochs does
    run = endless(resumed)
    assert seen + [next(run) for _ in range(60 - stop)] == whole


def test_state_counts_what_was_consumed_if_told():
    sampler = LengthBucketSampler(some_lengths(100), 4)
    loader = DataLoader(range(100), batch_sampler=sampler, collate_fn=list, num_workers=0)
    batches = iter(loader)
    seen = [next(batches) for _ in range(3)]
    assert seen == sampler.batches(0)[:3]
    assert sampler.state_dict()["position"] == 3
    resumed = LengthBucketSampler(some_lengths(100), 4)
    resumed.load_state_dict(sampler.state_dict(consumed=1))
    assert next(iter(resumed)) == sampler.batches(0)[1]


def test_another_number_of_processes_may_resume_the_same_joint_batches():
    two = LengthBucketSampler(some_lengths(100), 4, rank=1, world_size=2)
    batches = iter(two)
    next(batches)
    one = LengthBucketSampler(some_lengths(100), 8)
    one.load_state_dict(two.state_dict())
    assert set(next(batches)) < set(next(iter(one)))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"batch_size": 5}, "joint_size was 4, now it is 5"),
        ({"seed": 1}, "seed"),
        ({"lengths": some_lengths(100, seed=9)}, "lengths_sha256"),
        ({"shuffle": False}, "shuffle"),
        ({"drop_last": True}, "drop_last"),
        ({"bucket_batches": 7}, "bucket_batches"),
    ],
)
def test_state_of_another_run_is_refused(change, name):
    options = {"lengths": some_lengths(100), "batch_size": 4}
    state = LengthBucketSampler(**options).state_dict()
    with pytest.raises(ValueError, match=name):
        LengthBucketSampler(**(options | change)).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": []}, "at least one"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"bucket_batches": 0}, "bucket_batches must be at least 1"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank must be from 0 to world_size - 1 = 1, got 2"),
        ({"batch_size": 4, "drop_last": True}, "3 rows make no batch of 4"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"world_size": "2"}, "world_size must be a whole number, got '2'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ],
)
def test_sampler_refuses(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LengthBucketSampler(**({"lengths": [3, 4, 5], "batch_size": 2} | options))


def test_state_of_numpy_numbers_is_jsonable():
    sampler = LengthBucketSampler([3, 4, 5], np.int64(2), seed=np.int64(1))
    state = json.loads(json.dumps(sampler.state_dict()))
    LengthBucketSampler([3, 4, 5], 2, seed=1).load_state_dict(state)
