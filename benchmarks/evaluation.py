"""Compare the metrics of `hf-moe evaluate` with those of plain lm-eval, to the digit.

    python benchmarks/evaluation.py quickstart-output/model --data-root benchmarks-on-disk     CPU, about 20 minutes

Every task runs twice in one process: through `hf_moe.evaluation` as the command calls it, and through
`lm_eval.simple_evaluate(HFLM(MODEL), tasks=[task])`, where lm-eval's own HFLM loads the model and lm-eval's own loader
reads the task file. Only `dataset_path` and splits that the copy lacks are set for the latter, since lm-eval has no
option for data that lie in a folder. A group runs a second time as one call of plain lm-eval, in which its tasks share
batches. The command fails if a metric, a standard error or any document's result differs. Times are the wall time of
the whole run and say little: other programs may run beside it.
"""

import json
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml

from hf_moe.evaluation.plan import Evaluation
from hf_moe.evaluation.results import finite, harness_samples, read_samples
from hf_moe.evaluation.runner import evaluate
from hf_moe.evaluation.tasks import Tasks

ROOT = Path(__file__).resolve().parent.parent
SCORED = ("arc_easy", "arc_challenge", "boolq", "winogrande", "wikitext", "mmlu")
GENERATED = ("gsm8k",)
BATCH_SIZE, BOOTSTRAP = 16, 1000


def compare(names: tuple[str, ...], options: Namespace, limit: int | None, generation: Mapping[str, Any]) -> Any:
    """`results.json` of ours, and what to hold against it: tasks and groups by name."""
    plain = HFLM(options.model, device="cpu", batch_size=BATCH_SIZE, backend="causal")
    evaluation = Evaluation(
        options.model,
        names,
        data_root=options.data_root,
        limit=limit,
        generation=generation,
        batch_size=BATCH_SIZE,
        bootstrap_iters=BOOTSTRAP,
        options={"device": "cpu", "experts_implementation": plain.model.config._experts_implementation},
    )
    with tempfile.TemporaryDirectory() as folder:
        ours = evaluate(evaluation, Path(folder))
        samples = {name: read_samples(Path(folder) / entry["samples"]) for name, entry in ours["tasks"].items()}
    found = Tasks(names, data_root=options.data_root)
    settings = {"limit": limit, "gen_kwargs": dict(generation) or None, "bootstrap_iters": BOOTSTRAP}
    settings["task_manager"] = found.manager
    tasks = {}
    for name, entry in ours["tasks"].items():
        begin = time.perf_counter()
        task = plain_task(found.manager.task_index[name].yaml_path, options.data_root)
        theirs = lm_eval.simple_evaluate(plain, tasks=[task], **settings)
        seconds = {"hf_moe": round(entry["seconds"], 1), "lm_eval": round(time.perf_counter() - begin, 1)}
        documents = zip(samples[name], harness_samples(theirs["samples"][name]), strict=True)
        tasks[name] = {
            **{key: entry[key] for key in ("version", "num_fewshot", "num_samples", "num_available")},
            **{key: entry[key] for key in ("truncated_prompts", "data", "documents_sha256")},
            "metrics": side_by_side(entry["metrics"], theirs["results"][name]),
            "other_documents": sum(one != two for one, two in documents),
            "seconds": seconds,
        }
        print(name, tasks[name]["metrics"], seconds, flush=True)
    groups = {}
    for group in (found.groups[name] for name in names if name in found.groups):
        # the groups within it are in its results
        theirs = lm_eval.simple_evaluate(plain, tasks=[group], **settings)["groups"]
        for name, entry in ours["groups"].items():
            if name in theirs:
                groups[name] = {**entry, "metrics": side_by_side(entry["metrics"], theirs[name])}
    return ours, tasks, groups


def plain_task(file: Path, root: Path) -> ConfigurableTask:
    """The task as lm-eval reads its file, on the copy in `root`."""
    config = load_yaml(file)
    for key in ("tag", "group", "task_list"):
        config.pop(key, None)
    folder = root / config["dataset_path"]
    have = {path.stem for path in (folder / config["dataset_name"]).glob("*.jsonl")}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) not in have:
            config[key] = None
    return ConfigurableTask(config={**config, "dataset_path": str(folder)})


def side_by_side(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """By metric both values, both standard errors, and how far apart they are."""
    found = {}
    for key, entry in ours.items():
        metric, name = key.split(",", 1)
        other = {"value": finite(theirs[key]), "stderr": finite(theirs.get(f"{metric}_stderr,{name}"))}
        sides = {"hf_moe": {part: entry[part] for part in other}, "lm_eval": other}
        found[key] = sides | {"difference": max(_difference(entry[part], other[part]) for part in other)}
    return found


def _difference(one: float | None, two: float | None) -> float:
    if one is None or two is None:
        return 0.0 if one is two else float("inf")
    return abs(one - two)


def run(options: Namespace) -> int:
    scored, tasks, groups = compare(SCORED, options, options.limit, {})
    limit, generation = options.generation_limit, {"max_gen_toks": options.max_gen_toks}
    _, generated, _ = compare(GENERATED, options, limit, generation)
    everything = [*tasks.values(), *generated.values(), *groups.values()]
    largest = max(metric["difference"] for entry in everything for metric in entry["metrics"].values())
    others = sum(entry.get("other_documents", 0) for entry in everything)
    data = {
        **{key: scored[key] for key in ("date", "device", "harness", "versions", "model", "seeds")},
        "threads": torch.get_num_threads(),
        "batch_size": BATCH_SIZE,
        "limit": options.limit,
        "generation": {"limit": limit, **generation},
        "documents": sum(entry["num_samples"] for entry in [*tasks.values(), *generated.values()]),
        "largest_difference": largest,
        "other_documents": others,
        "tasks": {**tasks, **generated},
        "groups": groups,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{data['documents']:,} documents, largest difference {largest}, {others} with another result")
    return 0 if largest == 0 and others == 0 else 1


def parser() -> ArgumentParser:
    found = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    found.add_argument("model", help="a model folder")
    found.add_argument("--data-root", type=Path, required=True, help="local copies, as hf-moe evaluate takes them")
    found.add_argument("--limit", type=int, help="documents of each task; all if left out")
    found.add_argument("--generation-limit", type=int, default=50, help="documents of tasks that generate")
    found.add_argument("--max-gen-toks", type=int, default=64)
    found.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "evaluation.json")
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
