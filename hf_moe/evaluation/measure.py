"""One task or one domain: its metrics, samples and speed, and what single experts have to do with it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_moe.evaluation.bits_per_byte import bits_by_document
from hf_moe.evaluation.domains import documents_sha256, domain_entry
from hf_moe.evaluation.expert_metrics import count_expert_use, mask_refusal, masked_metrics
from hf_moe.evaluation.harness import HfMoeLM, Work
from hf_moe.evaluation.local_data import file_sha256
from hf_moe.evaluation.masking import MaskError
from hf_moe.evaluation.plan import Evaluation
from hf_moe.evaluation.results import Sample, finite, harness_metrics, harness_samples, write_samples
from hf_moe.evaluation.scoring import score

DOMAIN_BATCH = 8  # windows at a time


class Measure:
    """Measures one thing after the other with one model; what it returns goes into `results.json`.

    Args:
        output: Folder that the samples are written below.
    """

    def __init__(self, evaluation: Evaluation, lm: HfMoeLM, output: Path):
        self.evaluation, self.lm, self.output = evaluation, lm, output
        self.window = evaluation.window or min(lm.max_length, 1024)
        self.stride = evaluation.stride or max(1, self.window // 2)
        self.unmaskable = mask_refusal(lm) if evaluation.mask_experts else None

    def task(self, name: str, task: Any) -> dict[str, Any]:
        """A task of lm-eval that `scoring.prepare` has seen."""

        def scored(limit: float | None) -> dict[str, Any]:
            return score(self.lm, name, task, self.evaluation, limit)

        self.lm.clear_work()
        begin = time.perf_counter()
        with count_expert_use(self.lm) as use:
            found = scored(self.evaluation.limit)
        seconds, work = time.perf_counter() - begin, self.lm.work
        samples, count = harness_samples(found["samples"][name]), found["n-samples"][name]
        one_filter = [sample["doc"] for sample in samples if sample["filter"] == samples[0]["filter"]]
        return {
            "version": found["versions"][name],
            "num_fewshot": found["n-shot"][name],
            "num_samples": count["effective"],
            "num_available": count["original"],
            "metrics": harness_metrics(found["results"][name], found["higher_is_better"][name]),
            "documents_sha256": documents_sha256(one_filter),
            "truncated_prompts": work.truncated,
            **self._save(name, samples),
            "seconds": seconds,
            "speed": speed(work, seconds, count["effective"]),
            "experts": self._experts(
                use.by_layer(), samples, lambda limit: harness_samples(scored(limit)["samples"][name])
            ),
        }

    def domain(self, name: str, documents: list[str]) -> dict[str, Any]:
        """A domain of text."""

        def measured(some: list[str]) -> tuple[dict[str, Any], list[Sample]]:
            self.lm.input_mask = None
            sizes = {"window": self.window, "stride": self.stride}
            model, tokenizer = self.lm.model, self.lm.tokenizer
            parts = bits_by_document(model, tokenizer, some, **sizes, batch_size=DOMAIN_BATCH, progress=name)
            return domain_entry(some, parts, **sizes)

        begin = time.perf_counter()
        with count_expert_use(self.lm) as use:
            entry, samples = measured(documents)
        seconds = time.perf_counter() - begin
        return {
            **entry,
            **self._save(f"domain-{name}", samples),
            "seconds": seconds,
            "tokens_per_second": entry["tokens"] / seconds,
            "experts": self._experts(use.by_layer(), samples, lambda limit: measured(documents[:limit])[1]),
        }

    def _experts(
        self, layers: list[dict[str, Any]], samples: list[Sample], again: Callable[[int], list[Sample]]
    ) -> dict[str, Any] | None:
        if not layers:
            return None
        experts: dict[str, Any] = {"layers": layers, "masked": [], "masked_refused": self.unmaskable}
        if self.unmaskable is None:
            count, limit = self.evaluation.mask_experts, self.evaluation.mask_limit
            try:
                experts["masked"] = masked_metrics(self.lm, layers, samples, again, count=count, limit=limit)
            except MaskError as error:
                # a router that chooses by a table for some tokens alone: the benchmark's own metrics stand
                experts["masked_refused"] = str(error)
        return experts

    def _save(self, stage: str, samples: list[Sample]) -> dict[str, str]:
        path = self.output / samples_path(stage)
        write_samples(path, samples)
        return {"samples": samples_path(stage), "samples_sha256": file_sha256(path)}


def samples_path(stage: str) -> str:
    """Below the output folder."""
    # a task of a YAML file may be called anything
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in stage).lstrip(".")
    return f"samples/{safe}.jsonl"


def speed(work: Work, seconds: float, documents: int) -> dict[str, Any]:
    """Tokens without padding, and times; with the hooks that count expert use, which cost little."""

    def rate(tokens: int, spent: float) -> float | None:
        return finite(tokens / spent) if tokens and spent else None

    return {
        "seconds_per_document": seconds / documents,
        "scored_tokens": work.scored_tokens,
        "scored_tokens_per_second": rate(work.scored_tokens, work.scored_seconds),
        "seconds_per_forward": work.scored_seconds / work.forwards if work.forwards else None,
        "generated_tokens": work.generated_tokens,
        "generated_tokens_per_second": rate(work.generated_tokens, work.generated_seconds),
    }
