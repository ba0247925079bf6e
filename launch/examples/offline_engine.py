"""Asks one document two questions without a server:  python launch/examples/offline_engine.py MODEL"""

import sys

from obcache_sglang.engine import Engine


def main() -> None:
    engine = Engine(model_path=sys.argv[1], max_total_tokens=4096, obcache={"compression_ratio": 0.5})
    document = "\n".join(f"Room {2 * n - 1} shows the painter number {2 * n}." for n in range(1, 81))
    made = engine.compress(text=document)
    print(f"{made['kept_tokens']} of {made['context_tokens']} tokens kept in {made['seconds']:.1f} s")
    questions = ("Which painter is shown in room 7?", "Which painter is shown in room 33?")
    prompts = [f"{document}<|obcache|>\n\nQuestion: {question}\nAnswer:" for question in questions]
    for answer in engine.generate(prompts, {"max_new_tokens": 16, "temperature": 0}):
        print(f"{answer['meta_info']['obcache']['status']}: {answer['text']!r}")
    engine.shutdown()


# An engine starts processes that import this module again: without the guard each would start an engine.
if __name__ == "__main__":
    main()
