"""Jinja templates in the manner of published ones, for the tests of chat templates."""

CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

# Version 0.3's, with the system message before the first question.
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...!") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}"""

# With tools as JSON, a namespace, a macro, a loop that ends early, and methods of texts: what newer templates use.
TOOLS = """{%- macro one(tool) -%}{{ tool.function | tojson(indent=2) }}{%- endmacro -%}
{%- set state = namespace(last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{%- set state.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools -%}{{ '<|im_start|>system\n# Tools\n' }}{%- for tool in tools -%}{{ one(tool) + '\n' }}{%- endfor -%}
{{ '<|im_end|>\n' }}{%- endif -%}
{%- for message in messages -%}
    {%- if message.content is not string -%}{%- continue -%}{%- endif -%}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') -%}
    {{ '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.index0 > state.last -%}{{ '<think>\n\n</think>\n\n' }}{%- endif -%}
    {{ content }}
    {%- for call in message.tool_calls or [] -%}
        {{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
    {%- endfor -%}
    {{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""

MARKED = """{{ bos_token }}{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' }}
{% if message.role == 'assistant' %}
{% generation %}
{{- message.content + '<|im_end|>' -}}
{% endgeneration %}
{{ '\n' }}
{% else %}
{{ message.content + '<|im_end|>\n' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TRIMMED = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n\n{% endfor %}"
TRIMMED += "{% if add_generation_prompt %}[assistant]{% endif %}"
