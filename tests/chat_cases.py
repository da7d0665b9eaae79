"""Conversations and chat templates for the tests of chat data."""

from tiny_moe import tiny_tokenizer

CONTROL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|message|>",
    "<|channel|>",
]

# each as its model's is where it matters here, none with {% generation %} marks
TEMPLATES = {
    # Qwen3: the reasoning of earlier turns is left out, and the last turn always has some
    "qwen3": """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for t in tools %}{{- t | tojson + '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}
{%- if m.role == 'assistant' %}
{%- set content = (m.content or '').split('</think>')[-1].lstrip('\\n') %}
{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}{{- content }}
{%- for c in m.tool_calls or [] %}{{- '\\n<tool_call>\\n' + (c.function | tojson) + '\\n</tool_call>' }}{%- endfor %}
{%- else %}{{- m.content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}""",
    # OLMoE: a token that ends turns, no newline after the last
    "olmoe": """{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}
{{- '<|assistant|>\\n' + m.content }}
{%- if not loop.last %}{{ eos_token + '\\n' }}{% else %}{{ eos_token }}{% endif %}
{%- else %}{{ '<|' + m.role + '|>\\n' + m.content + '\\n' }}{% endif %}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}""",
    # gpt-oss: the last turn ends in another token, and reasoning goes once an answer has come
    "gpt-oss": """{%- for m in messages %}{%- if m.role == 'assistant' %}
{%- if m.tool_calls %}
{{- '<|start|>assistant to=functions.' + m.tool_calls[0].function.name + '<|channel|>commentary json<|message|>' }}
{{- (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}
{%- else %}
{%- if loop.last and m.thinking %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{%- endif %}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}""",
    # Qwen3.5: the prompt opens a thought
    "thinking": """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' %}{{- '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif %}
{{- m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}""",
}

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"a": {"type": "int"}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def called(**more):
    """A turn that calls a tool, and the tool's answer."""
    return [assistant(None, tool_calls=[CALL], **more), {"role": "tool", "content": "42"}]


def chat_tokenizer(template):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer
