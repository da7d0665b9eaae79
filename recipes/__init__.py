"""Recipes: one story a file, read it top to bottom, run it as it is.

    quickstart.py                 train a small MoE on real text, adapt it to a new domain, check everything
    finetune_expert_lora.py       LoRA on the experts
    finetune_adapter_experts.py   new small routed experts beside a frozen base
    finetune_esft.py              only the experts that a domain uses, at full rank
    finetune_full.py              every weight but the routers
    sft_trl.py                    expert LoRA in TRL's SFTTrainer
    dpo_trl.py                    expert LoRA in TRL's DPOTrainer
    evaluate.py                   a base and its fine-tuned version on the same benchmarks, compared

configs/ holds YAML files for real models, configs/quickstart/ those for the model of the quickstart and thresholds for
a comparison; data/ holds small sample data.
"""
