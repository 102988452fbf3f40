import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import aquifer.server.models
from aquifer.workloads.reference.generate import GreedyGenerator
from aquifer.workloads.reference.model import TrainingForward, new_model, reference_config
from aquifer.workloads.reference.tokenizer import BOS_ID, EOS_ID, PAD_ID
from aquifer.workloads.text2json import make_text2json

FOLDER = Path(aquifer.server.models.__file__).parent / "reference"


@pytest.fixture
def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = new_model(reference_config(512, layers=2, hidden=64, mlp=96)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.08)
    return model


def test_training_forward_has_the_losses_of_the_models_own_forward(small: LlamaForCausalLM) -> None:
    ids = torch.randint(3, 512, (3, 40))
    with torch.inference_mode():
        logits = small(ids).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        found = TrainingForward(small, torch.float32, compile_parts=False)(ids)[:, :-1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_batched_generation_is_that_of_generate_for_prompts_of_different_length(
    small: LlamaForCausalLM,
) -> None:
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in (5, 17, 30)]
    for prompt, found in zip(prompts, GreedyGenerator(small)(prompts, 24), strict=True):
        output = small.generate(
            torch.tensor([prompt]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )
        expected = output[0, len(prompt) :].tolist()
        assert found == (expected[: expected.index(EOS_ID)] if EOS_ID in expected else expected)


def test_the_bundled_model_extracts_every_record_of_a_short_document() -> None:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) <= 32_000_000
    sample = make_text2json(0, 700, lambda text: len(tokenizer.encode(text)))
    question = min(sample.questions, key=lambda question: len(question.answer))
    ids = [BOS_ID, *tokenizer.encode(sample.document), *tokenizer.encode(question.inputs)]
    output = model.generate(torch.tensor([ids]), max_new_tokens=400, do_sample=False)
    text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    assert json.loads(text) == json.loads(question.answer)
