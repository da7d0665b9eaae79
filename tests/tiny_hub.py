"""Tiny models under the names of real ones, in the cache that `from_pretrained` reads without a network."""

from pathlib import Path

from huggingface_hub import constants

from chat_cases import chat_tokenizer
from tiny_models import build_tiny

# what documents name, and the family whose class the real checkpoint loads
FAMILIES = {
    "Qwen/Qwen3-30B-A3B": "qwen3_moe",
    "allenai/OLMoE-1B-7B-0924": "olmoe",
    "openai/gpt-oss-20b": "gpt_oss",
    "mistralai/Mixtral-8x7B-Instruct-v0.1": "mixtral",
    "deepseek-ai/DeepSeek-V2-Lite": "deepseek_v2",
    "zai-org/GLM-4.5-Air": "glm4_moe",
}
_COMMIT = "0" * 40
CONTEXT = 512  # tokens


def put_into_cache(name: str) -> Path:
    """The folder of `name` in the cache of huggingface_hub, filled when it is first asked for."""
    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / _COMMIT
    if not (repository / "refs" / "main").exists():
        tokenizer = chat_tokenizer("qwen3")
        model, _ = build_tiny(FAMILIES[name], vocab_size=len(tokenizer), max_position_embeddings=CONTEXT)
        model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.save_pretrained(snapshot)
        tokenizer.model_max_length = CONTEXT
        tokenizer.save_pretrained(snapshot)
        # last: with it the name can be found
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(_COMMIT)
    return snapshot
