"""Chat templates of the two families that ship one, written for these tests after what the models expect."""

# Qwen2.5: default system message, tools in the system turn, calls and results in tags.
QWEN25 = r"""
{%- set first = messages[0] %}
{%- if first.role == 'system' %}
    {%- set system = first.content %}
{%- else %}
    {%- set system = 'You are helpful.' %}
{%- endif %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}
    {{- "\n\n# Tools\n\nSignatures are within <tool_call></tool_call> tags' neighbours:\n<tools>" }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\n</tools>\n\nAnswer with\n<tool_call>\n{\"name\": ...}\n</tool_call>" }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- call.name }}{{- '", "arguments": ' }}
            {{- call.arguments | tojson }}{{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' }}{{- message.content }}{{- '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""

# Qwen3: the thinking of earlier turns is cut out of the content by the template's own string work.
QWEN3 = r"""
{%- macro turn(role, text) %}<|im_start|>{{ role }}
{{ text | trim }}<|im_end|>
{% endmacro %}
{%- set ns = namespace(last=messages | length - 1, seeking=true) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role != 'user' %}{% continue %}{% endif %}
    {%- if message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>') %}
        {%- continue %}
    {%- endif %}
    {%- set ns.last = index %}
    {%- break %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last and reasoning %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {% generation %}{{- content + '<|im_end|>\n' }}{% endgeneration %}
    {%- elif message.role == 'tool' %}
        {%- set ns.text = '<tool_response>\n' ~ content ~ '\n</tool_response>' %}
        {{- '<|im_start|>user\n%s<|im_end|>\n' % ns.text }}
    {%- else %}
        {{- turn(message.role, content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ('<|im_start|>assistant\n   ').rstrip(' ') }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}
{%- if eos_token is defined and not add_generation_prompt %}{{- eos_token }}{% endif %}
"""
