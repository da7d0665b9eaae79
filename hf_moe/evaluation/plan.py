"""The plan of an evaluation: what to evaluate, and how. Checked here, before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_moe.evaluation.errors import EvaluationError

# lm-eval's own defaults: Python's generator gets 0, the others 1234
SEED = 1234


@dataclass(frozen=True)
class Evaluation:
    """Plan of an evaluation: what, on what, and how.

    Attributes:
        model: A folder, a name on the Hub, or a loaded model.
        tasks: Names, groups, tags or patterns of lm-eval, or YAML files of tasks.
        data: Text for bits per byte, see `hf_moe.data.documents.read_domains`.
        on_bad_row: Of rows of `data` that cannot be used: `error`, or `skip` to leave them out.
        adapter: A PEFT adapter's folder or name.
        data_root: Folder with local copies of the tasks' data, see `hf_moe.evaluation.local_data`.
        limit: Documents of each task, from the first; below 1 a share of them; None takes all.
        num_fewshot: Few-shot examples; None leaves each task's own number.
        generation: Options of generation tasks that replace the task's (`{"max_gen_toks": 64}`).
        chat_template: Whether the tasks' prompts go through the tokenizer's chat template.
        template_file: A Jinja file in place of the tokenizer's chat template.
        batch_size: A number, or "auto" for the largest that fits.
        seed: Of numpy's and torch's generators and of few-shot draws.
        mask_experts: So many of the most used experts of each task and domain are masked, one at a time.
        mask_limit: Documents of each masked run, from the first.
        window: Tokens that the model sees at once in a domain; None takes its context, at most 1,024.
        stride: By how much windows advance; None takes half of them.
        bootstrap_iters: Of lm-eval's standard error where a metric has no formula.
        run_unsafe_code: Allow tasks that run the code that the model writes.
        options: Of `HfMoeLM`: `experts_implementation` (None is hf_moe, where it runs the model), `device`, `dtype`,
            `tokenizer`, `max_length`, ...

    Raises:
        EvaluationError: If a number is out of range, a folder does not exist, or there is nothing to do.
    """

    model: str | PreTrainedModel
    tasks: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    on_bad_row: str = "error"
    adapter: str | None = None
    data_root: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)
    chat_template: bool = False
    template_file: Path | None = None
    batch_size: int | str = "auto"
    seed: int = SEED
    mask_experts: int = 0
    mask_limit: int = 50
    window: int | None = None
    stride: int | None = None
    bootstrap_iters: int = 100_000
    run_unsafe_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.limit, float) and self.limit.is_integer():
            object.__setattr__(self, "limit", int(self.limit))
        if not self.tasks and not self.data:
            raise EvaluationError(
                "there is nothing to evaluate. Name tasks (--tasks arc_easy,gsm8k) or text (--data law.txt)."
            )
        self._check_numbers()
        self._check_folders()

    def _check_numbers(self) -> None:
        limit = self.limit
        if limit is not None and not 0 < limit < 1 and (isinstance(limit, float) or limit < 1):
            raise EvaluationError(
                f"--limit must be a whole number of documents or a share between 0 and 1, got {limit:g}. Leave it out "
                "to take every document."
            )
        lowest = {"num_fewshot": 0, "mask_experts": 0, "mask_limit": 2, "seed": 0, "bootstrap_iters": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise EvaluationError(f"--{name.replace('_', '-')} must be {least} or more, got {value}.")
        size = str(self.batch_size)
        if size != "auto" and not (size.isdecimal() and int(size) > 0):
            raise EvaluationError(f"--batch-size must be a number above 0, or auto, got {self.batch_size!r}.")

    def _check_folders(self) -> None:
        for what, name in (("model", self.model), ("adapter", self.adapter)):
            if isinstance(name, str) and name.startswith((".", "/", "~")) and not Path(name).is_dir():
                raise EvaluationError(f"the {what} folder {name!r} does not exist. Check the path.")

    def settings(self) -> dict[str, Any]:
        """Settings that change the metrics, apart from the model and the data, as JSON values."""
        names = ("limit", "num_fewshot", "chat_template", "mask_experts", "mask_limit", "bootstrap_iters")
        return {**{name: getattr(self, name) for name in names}, "generation": dict(self.generation)}
