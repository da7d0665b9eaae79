"""Facts for cards: the report of the quickstart, of a recipe, and an evaluation's results."""

SHA = "0123456789abcdef" * 2 + "01234567"
LOG = [{"step": step, "loss": 5.0 - step / 8} for step in range(1, 12)]
RUN = {"steps": 11, "tokens": 2_816, "log": LOG}
COUNTS = {"train_documents": 9, "train_tokens": 4_321, "held_out_bytes": 678}
QUICKSTART = {
    "recipe": "quickstart",
    "new_domain": "legal",
    "command": "hf-moe quickstart --domain legal --minutes 5 --seed 0",
    "choices": {
        "layers": 4,
        "replay": 0.5,
        "experts": 16,
        "experts_per_token": 2,
        "expert_width": 128,
        "row_length": 256,
    }
    | {"vocab_size": 2048, "adapter_rank": 8, "learning_rate": 0.004, "adapter_learning_rate": 0.003},
    "date": "2026-11-21",
    "versions": {"torch": "2.13.0+cpu"},
    "machine": {"architecture": "x86_64", "device": "cpu", "torch_threads": 1},
    "text": {"code": COUNTS, "legal": COUNTS},
    "base": {**RUN, "parameters": {"total": 3_900_000, "active": 1_100_000}},
    "adapter": {**RUN, "trainable_parameters": 327_680}
    | {"router_sha256_before": "ab" * 32, "router_sha256_after": "ab" * 32},
    "evaluation": {
        "bits_per_byte": {
            "before": {"code": 2.5, "legal": 3.5},
            "after": {"code": 2.625, "legal": 3.0},
            "adapter off": {"code": 2.5, "legal": 3.5},
        },
        "routing_agreement": {"code": [1.0, 0.75], "legal": [1.0, 0.5]},
        "balance_before": {"load_entropy": [0.9, 0.8], "max_violation": [1.5, 2.5]},
    },
    "load_back": {"logits_equal": True, "sample": {"prompt": "The", "base": "a ```x``` b", "adapted": "{{ 7 * 7 }}"}},
    "seconds": {"base": 150.4, "adapter": 60.2},
    "interrupted": ["adapter"],
}
FINETUNE = {
    "recipe": "Expert LoRA",
    "date": "2026-11-22",
    "command": "python recipes/finetune_expert_lora.py --r 8",
    "model_type": "olmoe",
    "choices": {"r": 8, "model": "allenai/OLMoE-1B-7B-0924"},
    "versions": {"torch": "2.13.0"},
    "machine": {"architecture": "x86_64", "device": "NVIDIA H100", "processes": 8, "torch_threads": 4},
    "parameters": {"total": 7_000_000_000, "active": 1_300_000_000, "trained": 5_000_000},
    "saved_bytes": 20_000_000,
    "router_sha256": {"before": "ab" * 32, "after": "cd" * 32},
    "domains": {
        "law": {"share": 0.5, "examples": 3, "tokens": 99, "routing_agreement": [0.5]}
        | {"before": {"bytes": 70, "bits_per_byte": 1.5}, "after": {"bytes": 70, "bits_per_byte": 1.25}}
    },
    "training": {"learning_rate": 3e-4},
    "samples": [{"domain": "law", "prompt": "The court", "before": "is\n\n\nred.\n", "after": "finds."}],
    "held_out": {
        "before": {"loss": 2.0, "rewards/accuracies": 0.0},
        "after": {"loss": 1.5, "rewards/accuracies": 0.75},
    },
    "tokens": 2_560,
    "health": {"before": "Too few tokens to judge.", "after": "Routing is healthy: every layer uses its experts."},
    "steps": 10,
    "seconds_per_step": 2.5,
    "log": LOG,
}


def task(dataset: str, metric: str, value: float, **changes) -> dict:
    found = {
        "version": 3.0,
        "definition": "lm-evaluation-harness",
        "num_fewshot": 5,
        "num_samples": 1319,
        "num_available": 1319,
        "metrics": {metric: {"value": value, "stderr": 0.01, "higher_is_better": True}},
        "data": {"dataset": dataset, "config": "main", "split": "test", "sha256": {}}
        | {"hub_files": [f"hf://datasets/{dataset}@{SHA}/main/{split}.parquet" for split in ("test", "train")]},
        "truncated_prompts": 0,
    }
    return found | changes


MASKED = {
    "layers": [],
    "masked": [
        {"layer": "model.layers.1.mlp", "expert": 3, "share": 0.25, "documents": 50}
        | {"metrics": {"acc,none": {"difference": -0.125, "low": -0.25, "high": 0.01}}}
    ],
}
RESULTS = {
    "format": "hf_moe.evaluation/1",
    "date": "2026-11-22",
    "command": "hf-moe evaluate model --tasks gsm8k",
    "harness": {"name": "lm-evaluation-harness", "version": "0.4.13", "commit": None},
    "versions": {"lm-eval": "0.4.13"},
    "device": "cpu",
    "settings": {"limit": None, "generation": {}, "chat_template": False},
    "tasks": {
        "gsm8k": task("openai/gsm8k", "exact_match,strict-match", 0.125),
        "private": task("local", "acc,none", 0.5, experts=MASKED, truncated_prompts=7),
        "arc_easy": task("allenai/ai2_arc", "acc,none", 0.25, num_samples=6, num_available=2376, num_fewshot=0),
    },
    "groups": {"mmlu": {"tasks": ["a", "b"], "metrics": {"acc,none": {"value": 0.25, "stderr": 0.02}}}},
    "domains": {"notes": {"bytes": 1_000, "metrics": {"bits_per_byte": {"value": 2.25, "stderr": None}}}},
}
