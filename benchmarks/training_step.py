"""A whole training step, MiniLM-L6 shape to 3 layers with att_kl: bertkd against eager `output_attentions`.

    python benchmarks/training_step.py [--device cpu] [--rounds 9]

Both sides do the same work: teacher forward, student forward, KL between the maps of three pairs of blocks, backward,
AdamW. Weights are random (speed does not depend on them) and the same on both sides, and the two losses are compared
before anything is timed.
"""

from __future__ import annotations

import argparse
import copy

import torch
from timing import interleaved, quantiles, ratio
from transformers import BertConfig, BertModel

import bertkd

CASES = [(32, 128), (8, 512)]
PAIRS = [(0, 1), (1, 3), (2, 5)]


def networks(device: str) -> tuple[BertModel, BertModel]:
    """A teacher of MiniLM-L6's shape and its student of half the depth, without dropout."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teacher = BertModel(config, add_pooling_layer=False).to(device).eval()
    # Random weights make flat maps; sharper ones make a loss that is not all rounding.
    for parameter in teacher.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(2)
    student = bertkd.create_student(teacher, "first:3", verbose=False)
    return teacher, student.train()


def eager_loss(teacher, student, batch) -> torch.Tensor:
    """What one writes without bertkd: maps of every layer of both networks, KL on three pairs."""
    with torch.no_grad():
        maps_t = teacher(**batch, output_attentions=True).attentions
    maps_s = student(**batch, output_attentions=True).attentions
    loss = torch.zeros((), device=batch["input_ids"].device)
    for s, t in PAIRS:
        p_s, p_t = maps_s[s], maps_t[t]
        loss = (
            loss + (p_t * (p_t.clamp_min(1e-30).log() - p_s.clamp_min(1e-30).log())).sum(-1).mean()
        )
    return loss


def stepper(loss_of, parameters):
    """A full optimisation step around a loss."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}")
    print("(B, L)         eager ms  bertkd ms  eager/bertkd")
    for batch_size, length in CASES:
        teacher, student = networks(args.device)
        eager = [copy.deepcopy(model) for model in (teacher, student)]
        for model in eager:
            model.set_attn_implementation("eager")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(1000, 30000, (batch_size, length), generator=generator)
        batch = {
            "input_ids": ids.to(args.device),
            "attention_mask": torch.ones_like(ids).to(args.device),
        }
        distiller = bertkd.Distiller(teacher, student, "att_kl", layer_map=PAIRS)
        ours, theirs = distiller(batch).loss, eager_loss(*eager, batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
        seconds = interleaved(
            {
                "eager": stepper(lambda e=eager, b=batch: eager_loss(*e, b), eager[1].parameters()),
                "bertkd": stepper(lambda d=distiller, b=batch: d(b).loss, student.parameters()),
            },
            rounds=args.rounds,
        )
        medians = [quantiles(seconds[name])[1] for name in ("eager", "bertkd")]
        print(
            f"{(batch_size, length)!s:12s} {medians[0]:10.1f} {medians[1]:10.1f} "
            f"{ratio(seconds, 'eager', 'bertkd'):13.2f}"
        )


if __name__ == "__main__":
    main()
