"""Models in PEFT's wrapper, with a stand-in of its shape: forward names few arguments, attributes are the model's."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_batch, tiny_model
from torch import nn
from torch.utils.data import default_collate

import bertkd
from bertkd.encoders import base_model, unwrap
from bertkd.errors import UnsupportedEncoderError
from bertkd.training import Supervised, predict


class PeftMixedModel(nn.Module):
    """For adapters of several kinds: it says nothing of what it hands on."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model")["model"], name)

    def forward(self, *args, **kwargs):
        return self.base_model["model"](*args, **kwargs)


class Adapted(PeftMixedModel):
    def __init__(self, model, prompts=False):
        super().__init__(model)
        self.active_peft_config = SimpleNamespace(is_prompt_learning=prompts)

    def get_base_model(self):
        return self.base_model["model"]

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        labels = {} if labels is None else {"labels": labels}
        return self.base_model["model"](input_ids, attention_mask, **labels, **kwargs)


class Adapter(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora = nn.Linear(layer.in_features, layer.out_features)

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora(hidden)


def adapt(model):
    for block in model.base_model.encoder.layer:
        block.attention.self.query = Adapter(block.attention.self.query)
    return model


@pytest.mark.parametrize(
    ("head", "wrapper"),
    [(None, Adapted), ("sequence", Adapted), ("mlm", Adapted), ("sequence", PeftMixedModel)],
)
def test_an_adapted_student_gets_every_column_and_trains(head, wrapper):
    """Also token types, which the wrapper's forward does not name."""
    teacher = tiny_model("bert", layers=4, head_cls=head)
    student = adapt(tiny_model("bert", seed=1, head_cls=head))
    batch = tiny_batch(teacher)
    assert batch["token_type_ids"].any()
    objective = "att_kl + hid_seq" + (" + kd" if head else "")
    want = bertkd.Distiller(teacher, student, objective)(batch).loss
    wrapped = wrapper(student)
    assert (unwrap(wrapped), base_model(wrapped)) == (student, student.base_model)
    got = bertkd.Distiller(teacher, wrapped, objective)(batch).loss
    assert torch.equal(got, want)
    got.backward()
    assert student.base_model.encoder.layer[0].attention.self.query.lora.weight.grad is not None


@pytest.mark.parametrize(
    "wrap", [Adapted, partial(Adapted, prompts=True), PeftMixedModel], ids=["", "prompts", "mixed"]
)
def test_an_adapted_model_is_fine_tuned_and_judged_on_every_column(wrap):
    model = adapt(tiny_model("bert", head_cls="sequence"))
    wrapped, batch = wrap(model), tiny_batch(model, labels=True)
    assert torch.equal(Supervised(wrapped)(batch).loss, Supervised(model)(batch).loss)
    rows = [{name: column[i] for name, column in batch.items()} for i in range(2)]
    found, wanted = (predict(each, rows, default_collate)[0] for each in (wrapped, model))
    assert (found == wanted).all()


def test_prompts_before_the_tokens_are_refused():
    with pytest.raises(UnsupportedEncoderError, match=r"Adapted puts prompts .* LoRA"):
        bertkd.Distiller(tiny_model("bert", layers=4), Adapted(tiny_model("bert"), prompts=True))


def test_a_student_of_an_adapted_teacher_is_refused():
    teacher = Adapted(adapt(tiny_model("bert", head_cls="sequence")))
    with pytest.raises(UnsupportedEncoderError, match=r"query\.base_layer.*merge_and_unload"):
        bertkd.create_student(teacher, "first:1")
