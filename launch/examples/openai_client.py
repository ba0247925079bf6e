"""Asks one document two questions with the openai client:  python launch/examples/openai_client.py [URL]

The server: bash launch/serve.sh small --port 30000
"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
client = OpenAI(base_url=f"{url}/v1", api_key="none")

document = "\n".join(f"Room {2 * n - 1} shows the painter number {2 * n}." for n in range(1, 81))
for question in ("Which painter is shown in room 7?", "Which painter is shown in room 33?"):
    answer = client.chat.completions.create(
        model="default",
        # The marker ends what the questions share.
        messages=[{"role": "user", "content": f"{document}<|obcache|>\n\n{question}"}],
        max_tokens=16,
        temperature=0,
        # Settings of the request, if they are to differ from the server's.
        extra_body={"custom_params": {"obcache": {"ttl_seconds": 600}}},
    )
    report = answer.model_dump()["metadata"]["obcache"]
    print(
        f"{report['status']}: {report['kept_tokens']} of {report['context_tokens']} tokens kept; {answer.choices[0].message.content!r}"
    )
