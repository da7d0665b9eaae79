"""lm-evaluation-harness's own Hugging Face model, which also knows hf_moe models, their backends and adapters.

Registered as `hf-moe`: `lm_eval.simple_evaluate(model="hf-moe", model_args={"pretrained": DIR, "adapter": A})`. Scores
are HFLM's to the digit: what is overridden here counts, times and refuses, and then calls HFLM.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe.adapters.load_adapter import load_adapter
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.loading.config_files import check_config
from hf_moe.loading.pretrained import find_model, language_class

LARGEST_CPU_BATCH = 16


@dataclass
class Work:
    """Work of the model since the last `clear_work`: tokens without padding, seconds of its calls.

    Attributes:
        scored_tokens: Tokens that went through the forwards of log-likelihood requests.
        scored_seconds: Their time.
        forwards: Their number.
        generated_tokens: New tokens of generation requests.
        generated_seconds: Their time, that of reading the prompts included.
        truncated: Requests that lost the beginning of their prompt, being longer than the model's context.
    """

    scored_tokens: int = 0
    scored_seconds: float = 0.0
    forwards: int = 0
    generated_tokens: int = 0
    generated_seconds: float = 0.0
    truncated: int = 0


@register_model("hf-moe")
class HfMoeLM(HFLM):
    """HFLM for a Mixture-of-Experts.

    Args:
        pretrained: A folder, a name on the Hub, or a loaded model.
        adapter: A PEFT adapter's folder or name. LoRA on experts runs through its factors.
        experts_implementation: A backend of transformers or of hf_moe; None leaves the model's own.
        device: None is the GPU if there is one.
        batch_size: A number, or "auto" for the largest that fits. Without a GPU that is a guess from the free memory,
            at most 16: there a batch that is too large ends the program.
        options: Those of HFLM (`dtype`, `tokenizer`, `max_length`, `trust_remote_code`, ...).

    Raises:
        EvaluationError: For a device or dtype that is not there; lm-eval would take another device.
        ModelError: If there is no such model, or it is no language model.
        ValueError: For an unknown experts implementation, or one that refuses the model.
        OSError: If the model or adapter cannot be found.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        *,
        adapter: str | None = None,
        experts_implementation: str | None = None,
        device: str | None = None,
        batch_size: int | str | None = "auto",
        **options: Any,
    ):
        device = _checked_device(device)
        _check_dtype(options.get("dtype", "auto"))
        self._is_named = isinstance(pretrained, str)
        if isinstance(pretrained, str):
            find_model(pretrained)
            check_config(pretrained)
        if experts_implementation is not None:
            if isinstance(pretrained, str):
                options["experts_implementation"] = experts_implementation
            else:
                pretrained.set_experts_implementation(experts_implementation)
        options.setdefault("backend", "causal")
        super().__init__(pretrained, device=device, batch_size=batch_size or "auto", **options)
        if adapter is not None:
            self._model = load_adapter(self.model, adapter).eval()
            self.peft = adapter
        if self.batch_size == "auto" and self.device.type == "cpu":
            self.batch_size_per_gpu: int | str = cpu_batch_size(self.model, self.max_length)
        self.work = Work()
        self.input_mask: Tensor | None = None
        self._is_trial = False

    def _get_backend(self, config: Any, *args: Any, **options: Any) -> None:
        # the class that loads the checkpoint whole; HFLM would read the text model out of a vision-language one
        super()._get_backend(config, *args, **options)
        if self._is_named and self.backend == "causal":
            self.AUTO_MODEL_CLASS = language_class(config, config.name_or_path)

    def clear_work(self) -> None:
        self.work = Work()

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        self.input_mask = torch.zeros_like(inps, dtype=torch.bool) if self._is_trial else without_right_padding(inps)
        self.work.scored_tokens += int(self.input_mask.sum())
        self.work.forwards += 1
        with self._timed("scored_seconds"):
            return super()._model_call(inps, attn_mask, labels)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        self.input_mask = None  # the model gets an attention mask
        with self._timed("generated_seconds"):
            result = super()._model_generate(context, max_length, stop, **options)
        self.work.generated_tokens += int((result[:, context.shape[1] :] != self.tokenizer.pad_token_id).sum())
        return result

    def _detect_batch_size(self, *args: Any, **options: Any) -> int:
        before, self.work, self._is_trial = self.work, Work(), True
        try:
            return super()._detect_batch_size(*args, **options)
        finally:
            self.work, self._is_trial = before, False

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = self.max_length + 1
        self.work.truncated += sum(len(prompt) + len(answer) > longest for _, prompt, answer in requests)
        # a rolling log-likelihood calls this for each batch of windows, under a bar of its own
        is_rolling = override_bs is not None
        return super()._loglikelihood_tokens(requests, _has_no_bar(disable_tqdm) or is_rolling, override_bs)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, _has_no_bar(disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return super().loglikelihood_rolling(requests, _has_no_bar(disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        for request in requests:
            prompt, options = request.args
            self.work.truncated += len(self.tok_encode(prompt)) > self.prompt_room(request.task_name, options)
        return super().generate_until(requests, disable_tqdm=_has_no_bar(disable_tqdm))

    def prompt_room(self, task: str, options: Mapping[str, Any]) -> int:
        """Tokens of the model's context that a task's generation options leave for its prompt.

        Raises:
            EvaluationError: If that is none.
        """
        room = self.max_length - _new_tokens(options, self.max_gen_toks)
        if room < 1:
            raise EvaluationError(
                f"the task {task!r} asks for {self.max_length - room} new tokens, and the model's context has "
                f"{self.max_length}: no room is left for the prompt. Ask for fewer: --generation "
                f"max_gen_toks={self.max_length // 4}."
            )
        return room

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        self._synchronize()
        begin = time.perf_counter()
        yield
        self._synchronize()
        setattr(self.work, what, getattr(self.work, what) + time.perf_counter() - begin)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _has_no_bar(disabled: bool) -> bool:
    """In a file each step of a progress bar is a line."""
    return disabled or not sys.stderr.isatty()


def _checked_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    known = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        kind = accelerator.type
        known += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    if device not in known:
        raise EvaluationError(f"--device must be one of {', '.join(known)} on this machine, got {device!r}.")
    return device


def _check_dtype(dtype: str | torch.dtype) -> None:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise EvaluationError(f"--dtype must be auto, float32, bfloat16 or float16, got {dtype!r}.")


def _new_tokens(options: Mapping[str, Any], default: int) -> int:
    """lm-eval's rule, with the names that it takes for the same thing."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return next((int(options[name]) for name in names if options.get(name) is not None), default)


def without_right_padding(tokens: Tensor) -> Tensor:
    """Mask of the tokens in a row, bool of the same shape: HFLM pads log-likelihood rows on the right with id 0.

    Real tokens of id 0 at the very end of a row count as padding.
    """
    return tokens.flip(-1).ne(0).int().cummax(-1).values.bool().flip(-1)


def cpu_batch_size(model: PreTrainedModel, length: int) -> int:
    """A power of two, at most `LARGEST_CPU_BATCH`, whose logits and softmax fill a quarter of the free memory."""
    import psutil

    row = 2 * 4 * length * model.config.get_text_config().vocab_size
    rows = max(1, psutil.virtual_memory().available // 4 // row)
    return min(LARGEST_CPU_BATCH, 1 << (rows.bit_length() - 1))
