"""What the model writes: greedy continuations of a few held-out prompts, the same before and after training."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

import torch
from torch import nn

from hf_moe.data.encoding import IGNORED, Example
from hf_moe.finetuning.domains import Measurable
from hf_moe.finetuning.prepare import Job

NEW_TOKENS = 40
_TEXT_PROMPT, _LONGEST_PROMPT = 24, 200  # tokens: of a text without a prompt of its own, and at most


@dataclass(frozen=True)
class Sample:
    """A prompt from the held-out records of `domain`, and what the model wrote after it, without special tokens."""

    domain: str
    prompt: str
    text: str


@torch.no_grad()
def write_samples(job: Job[Measurable], model: nn.Module) -> list[Sample]:
    """Continue the first held-out prompts of every domain in turn, greedily: as many as `sample_prompts` says.

    The prompt is what precedes the first token that is learned, or the beginning of a text. Prompts that leave no room
    in the row are left out: there may be no sample.
    """
    count, new_tokens = job.training.sample_prompts, NEW_TOKENS
    if job.training.smoke:
        count, new_tokens = min(count, 1), 4
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    samples = []
    try:
        for domain, ids in islice(_prompts(job.data, new_tokens), count):
            inputs = torch.tensor([ids], device=device)
            written = model.generate(  # type: ignore[operator]
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=job.tokenizer.eos_token_id,
            )[0, len(ids) :]
            prompt, text = (job.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, written))
            samples.append(Sample(domain, prompt, text))
    finally:
        model.train(was_training)
    return samples


def _prompts(data: Measurable, new_tokens: int) -> Iterator[tuple[str, list[int]]]:
    """Domain and tokens, of the first domain first, one domain after the other."""
    room = min(_LONGEST_PROMPT, data.longest - new_tokens)
    fitting = [
        [(name, ids) for example in domain.held_out.examples if 2 <= len(ids := _prompt(example)) <= room]
        for name, domain in data.domains.items()
    ]
    return (found for found in chain.from_iterable(zip_longest(*fitting)) if found is not None)


def _prompt(example: Example) -> list[int]:
    learned = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    # of a text only the first token, with which it begins, is not learned
    return example.input_ids[: learned if learned > 1 else min(_TEXT_PROMPT, len(example.input_ids) // 2)]
