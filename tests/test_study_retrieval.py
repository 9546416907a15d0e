"""Retrieval scores against hand-computed cases, and the embeddings they are made of."""

import math

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer

from bertkd.errors import NonFiniteError
from bertkd.study.retrieval import RetrievalJudge, embed, score_similarities


@pytest.fixture
def tiny_encoder():
    return tiny_model("bert"), tiny_tokenizer()


def test_scores_of_a_hand_computed_case():
    similarities = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.4, 0.3], [0.8, 0.7, 0.6]])
    scores = score_similarities(similarities)
    # The right documents rank 1st, 2nd and 3rd.
    assert scores["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert scores["top1"] == pytest.approx(1 / 3)
    assert "spearman" not in scores


def test_spearman_of_a_hand_computed_case():
    ours = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    teacher = torch.tensor([[10.0, 30.0], [20.0, 40.0]])
    # Ranks 1,2,3,4 against 1,3,2,4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15).
    assert score_similarities(ours, teacher)["spearman"] == pytest.approx(1 - 12 / 60)
    assert score_similarities(ours, ours.exp())["spearman"] == pytest.approx(1.0)
    assert score_similarities(ours, -ours)["spearman"] == pytest.approx(-1.0)


def test_a_collapsed_model_scores_like_chance():
    scores = score_similarities(torch.ones(5, 5), torch.randn(5, 5))
    assert scores["mrr"] == pytest.approx(1 / 3)
    assert scores["top1"] == scores["spearman"] == 0.0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="square"):
        score_similarities(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="teacher similarities"):
        score_similarities(torch.zeros(2, 2), torch.zeros(3, 3))


def test_embed_keeps_the_order_and_ignores_the_batching(tiny_encoder):
    model, tokenizer = tiny_encoder
    texts = ["a b c d e f g h", "a", "b c", "h g f e d", "c c c"]
    model.train()
    seen = []
    together = embed(model, tokenizer, texts, batch_size=2, on_batch=seen.append)
    alone = torch.cat([embed(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(5))
    assert model.training
    assert seen[-1] == 1.0
    assert seen == sorted(seen)

    # An independent computation of one of them, without any padding.
    model.eval()
    ids = tokenizer(texts[3], return_tensors="pt")
    with torch.no_grad():
        state = model(**ids).last_hidden_state[0]
    expected = state.mean(0) / state.mean(0).norm()
    torch.testing.assert_close(together[3], expected, atol=1e-6, rtol=0)


def test_embed_cuts_long_texts(tiny_encoder):
    model, tokenizer = tiny_encoder
    long = embed(model, tokenizer, ["a b c d e f g h"], max_length=5)
    torch.testing.assert_close(long, embed(model, tokenizer, ["a b c"]), atol=1e-6, rtol=0)


def test_embed_refuses_nothing_and_nan(tiny_encoder):
    model, tokenizer = tiny_encoder
    with pytest.raises(ValueError, match="empty"):
        embed(model, tokenizer, [])
    with torch.no_grad():
        model.embeddings.LayerNorm.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="embeddings"):
        embed(model, tokenizer, ["a"])


def test_judge_scores_a_model_against_itself(tiny_encoder):
    model, tokenizer = tiny_encoder
    texts = ["a b", "c d e", "f", "g h a b", "e e"]
    judge = RetrievalJudge(texts, texts, tokenizer)
    judge.teacher = judge.similarities(model)
    scores = judge(model)
    # Each text is its own nearest document, and the model agrees with itself.
    assert (scores["mrr"], scores["top1"]) == (1.0, 1.0)
    assert scores["spearman"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="2 queries for 1"):
        RetrievalJudge(["a", "b"], ["c"], tokenizer)
